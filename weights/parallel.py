"""Many small products at the same time, each computed by a single thread."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def single_threaded() -> Iterator[None]:
    """A block in which torch computes on one thread: for many small passes over memory, at which more threads mostly
    wait for each other, spinning. Afterwards the number of threads is as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Scratch(threading.local):
    """Memory for what lies between two steps, each thread's own and used again from item to item: fresh memory costs
    a page fault for every 4 KiB, which can take as long as the computing."""

    def __init__(self):
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def empty(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A contiguous tensor with any values. It is overwritten by the next one of that name in this thread."""
        count = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < count:
            held = self._held[name, dtype] = torch.empty(count, dtype=dtype)
        return held[:count].view(shape)

    def cast(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """In that dtype: the tensor itself where it is, else a copy as `empty` makes them."""
        if tensor.dtype == dtype:
            return tensor
        return self.empty(name, *tensor.shape, dtype=dtype).copy_(tensor)


@contextmanager
def map_single_threaded(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int = 1
) -> Iterator[Iterator[Result]]:
    """`map(function, items)` on several threads, as many as torch would use, each computing on one thread.

    Small products wait for memory more than for the processor. Threads that share one product mostly wait for each
    other, and they wait by spinning, which takes the processor from others. Threads with a product each do not. The
    result is then also the same whatever the number of threads is.

    Args:
        function: called without gradients, with torch set to one thread.
        items: read at once, before the first call.
        at_once: how many items a thread takes in one go, for work that takes less time than handing it over.

    Yields:
        An iterator over the results, in the order of the items. When the block is left, also by an exception, items
        that have not begun are cancelled, those that have are waited for, and torch's number of threads is as before.
        What `function` raises comes out where its result is asked for.
    """
    threads = torch.get_num_threads()
    items = list(items)

    def work(first: int) -> list[Result]:
        with torch.no_grad():  # grad mode is a thread's own
            return [function(item) for item in items[first : first + at_once]]

    try:
        with ThreadPoolExecutor(threads, "styleloom", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(work, first) for first in range(0, len(items), at_once)]
            try:
                yield (result for future in futures for result in future.result())
            finally:
                for future in futures:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)  # what a worker sets is also what threads to come would start with
