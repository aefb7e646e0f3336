"""Threads that compute alone: order, errors, cancelling, and torch's own number of threads afterwards."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from styleloom.weights.parallel import Scratch, map_single_threaded


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_results_come_in_order(at_once):
    def slow_first(i):
        time.sleep(0.02 if i == 0 else 0)
        return i * i, torch.get_num_threads()

    with map_single_threaded(slow_first, range(20), at_once) as results:
        assert list(results) == [(i * i, 1) for i in range(20)]


def test_an_error_inside_stops_the_rest():
    done = []

    def fails(i):
        if i == 3:
            raise KeyError("third")
        time.sleep(0.005)
        done.append(i)

    with pytest.raises(KeyError, match="third"), map_single_threaded(fails, range(500)) as results:
        list(results)
    assert len(done) < 500


def test_leaving_early_waits_for_what_runs_and_cancels_the_rest():
    done = []

    def work(i):
        time.sleep(0.005)
        done.append(i)
        return i

    class Stop(Exception):
        pass

    with pytest.raises(Stop), map_single_threaded(work, range(500)) as results:
        next(results)
        raise Stop
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count < 500
    assert not [t for t in threading.enumerate() if t.name.startswith("styleloom")]


def test_one_and_many_threads_give_the_same_bits():
    weights = [torch.randn(300, 64).bfloat16() for _ in range(8)]
    x = torch.randn(4, 64).bfloat16()

    def run(threads):
        torch.set_num_threads(threads)
        with map_single_threaded(lambda w: torch.nn.functional.linear(x, w), weights) as results:
            found = torch.stack(list(results))
        torch.set_num_threads(2)
        return found

    assert torch.equal(run(1), run(4))


def test_scratch_is_used_again_and_is_each_threads_own():
    scratch = Scratch()
    first = scratch.empty("a", 2, 3)
    assert scratch.empty("a", 3).data_ptr() == first.data_ptr() != scratch.empty("b", 2, 3).data_ptr()
    assert scratch.empty("a", 2, 2, dtype=torch.float64).dtype == torch.float64
    assert scratch.empty("a", 4, 5).shape == (4, 5), "it grows"
    half = torch.tensor([1.5, -2.0], dtype=torch.float16)
    assert scratch.cast("c", half, torch.float16) is half
    assert torch.equal(scratch.cast("c", half, torch.float32), torch.tensor([1.5, -2.0]))
    other = []
    thread = threading.Thread(target=lambda: other.append(scratch.empty("a", 4, 5).fill_(7.0)))
    scratch.empty("a", 4, 5).zero_()
    thread.start()
    thread.join()
    assert not scratch.empty("a", 4, 5).any() and bool((other[0] == 7).all())
