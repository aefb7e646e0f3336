"""Asymmetric CFG in the real host against the two-pass truth: core's own Dual Model CFG Guider on two separate models,
one with the positive LoRA merged by the host's loader and one with the negative LoRA."""

from __future__ import annotations

import pytest
from branch_parts import benches  # noqa: F401  fixtures

ARCHITECTURES = ("sdxl", "sd1.5", "z-image", "qwen-image", "flux2")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_two_passes_and_not_the_symmetric_result(name, benches, kit):
    bench, distance = benches(name), kit.two_passes.distance
    style, gray = bench.lora(1), bench.lora(2, rank=3, alpha=None)
    ours = bench.asymmetric(positive_lora=style, negative_lora=gray, positive_strength=0.8, negative_strength=0.5)
    truth = bench.truth([(style, 0.8)], [(gray, 0.5)])
    symmetric = bench.symmetric((style, 0.8))
    assert distance(ours, truth) < 1e-4
    assert distance(ours, symmetric) > 100 * distance(ours, truth) + 1e-3


@pytest.mark.parametrize("name", ("sd1.5", "flux2"))
def test_both_truths_agree(name, benches, kit):
    """Core's Dual Model CFG Guider and plain CFG with the negative side routed to another model: the same thing."""
    bench = benches(name)
    style, gray = bench.lora(1), bench.lora(2)
    sides = ([(style, 0.8)], [(gray, 0.5)])
    assert kit.two_passes.distance(bench.routed(*sides), bench.truth(*sides)) < 1e-5
