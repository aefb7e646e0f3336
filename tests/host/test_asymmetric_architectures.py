"""Asymmetric CFG in the real host against the two-pass truth: core's own Dual Model CFG Guider on two separate models,
one with the positive LoRA merged by the host's loader and one with the negative LoRA."""

from __future__ import annotations

import pytest
from shared_models import BOUND, ONE

ARCHITECTURES = ("sdxl", "sd1.5", "z-image", "qwen-image", "flux2")


def both(bench, sampling):
    """(ours, the truth, the positive LoRA)."""
    style, gray = bench.lora(1), bench.lora(2, rank=3, alpha=None)
    ours = bench.asymmetric(positive_lora=style, negative_lora=gray, positive_strength=0.8, negative_strength=0.5,
                            sampling=sampling)  # fmt: skip
    return ours, bench.truth([(style, 0.8)], [(gray, 0.5)], sampling=sampling), style


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_two_passes_with_all_blocks(name, benches, distance):
    """Every layer that the architecture has, at its true depth. The other tests take nets of few blocks."""
    ours, truth, _ = both(benches(name, short=False), ONE)
    assert distance(ours, truth) < BOUND


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_two_passes_and_not_the_symmetric_result(name, benches, distance):
    bench = benches(name)
    ours, truth, style = both(bench, {"steps": 2})
    symmetric = bench.symmetric((style, 0.8), sampling={"steps": 2})
    assert distance(ours, truth) < BOUND
    assert distance(ours, symmetric) > 100 * distance(ours, truth) + 1e-3


@pytest.mark.parametrize("name", ("sd1.5", "flux2"))
def test_both_truths_agree(name, benches, distance):
    """Core's Dual Model CFG Guider and plain CFG with the negative side routed to another model: the same thing."""
    bench = benches(name)
    style, gray = bench.lora(1), bench.lora(2)
    sides = ([(style, 0.8)], [(gray, 0.5)])
    # The one batches both sides, the other does not: sums may run in another order.
    assert distance(bench.routed(*sides), bench.truth(*sides)) < BOUND
