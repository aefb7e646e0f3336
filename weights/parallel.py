"""Many small products at once, each computed by one thread alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def map_single_threaded(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int = 1
) -> Iterator[Iterator[Result]]:
    """`map(function, items)` on as many threads as torch would use, each of which computes without helpers.

    Thin products wait for memory: threads that share one mostly wait for each other (by spinning, which is ruinous on
    a busy machine), threads with products of their own do not. The result, too, is then the same whatever the number
    of threads is.

    `at_once` items are handed to a thread in one go, for work that takes less time than handing it over.

    Used as a context manager that gives the results in order; when it is left, also by an exception of the caller's,
    what has not begun is cancelled, what has is waited for, and torch's number of threads is as before.
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
