"""Asymmetric CFG in bfloat16 adds no more rounding than two passes on merged models do."""

from __future__ import annotations

import pytest
import torch
from shared_models import ONE

SEEDS = range(4)


@pytest.fixture
def low(kit, benches, monkeypatch):
    """(architecture, storage) → its bench in bfloat16: computed and stored, or cast at each use."""

    def make(name, stored):
        def config(cls, unet_config):
            made = cls(unet_config)
            made.set_inference_dtype(stored, torch.bfloat16 if stored == torch.float32 else None)
            return made

        run = benches(name).run
        with monkeypatch.context() as patch:
            patch.setattr(kit.diffusion, "_config", config)
            bench = kit.two_passes.Bench(run, kit, name)
            bench.merged(), bench.merged(side="negative")  # made now, and not when they are first needed
        return bench

    return make


def guiders(bench, ours, truth):
    """(ours, two passes): made once, so that the host patches the models once for all seeds."""
    positive, negative = bench.merged(*truth[0]), bench.merged(*truth[1], side="negative")
    passes = bench.run("DualModelGuider", model=positive, model_negative=negative, cfg=3.5,
                       positive=bench.positive, negative=bench.negative)[0]  # fmt: skip
    return bench.guider(**ours), passes


@pytest.fixture(scope="module")
def exact(benches, loras):
    """architecture → the two passes in float32, one result for each seed."""
    made = {}

    def get(name):
        if name not in made:
            bench = benches(name)
            _, passes = guiders(bench, *loras(name))
            made[name] = [bench.through(passes, seed=seed, **ONE) for seed in SEEDS]
        return made[name]

    return get


@pytest.mark.parametrize("name", ("sd1.5", "flux2"))
@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16))
def test_in_bfloat16(name, stored, exact, low, loras, distance):
    """Ours against two passes, each by its distance from the float32 truth, over four seeds of noise.

    One seed says little: which seed has which ratio of the two errors is the processor's matter (in which order it
    sums, and whether it rounds products first). So the errors are summed in squares. The bound: the merged pass rounds
    a layer's output once. Ours rounds the layer's part, the LoRA's part and their sum: three roundings, each at most of
    that size, so at most three times the variance, whatever the processor. A LoRA that is left out or on the wrong side
    moves the result by more than that: the last assertion.
    """
    ours, truth = loras(name)
    made, passes, apart = [], [], []
    bench, due = low(name, stored), exact(name)
    our_guider, two_passes = guiders(bench, ours, truth)
    for seed in SEEDS:
        ours_low, passes_low = (bench.through(guider, seed=seed, **ONE) for guider in (our_guider, two_passes))
        made.append(distance(ours_low, due[seed]) ** 2)
        passes.append(distance(passes_low, due[seed]) ** 2)
        apart.append(distance(ours_low, passes_low) ** 2)
    other = distance(passes_low, bench.symmetric(truth[0][0], sampling={**ONE, "seed": seed}))
    rounding = (sum(passes) / len(passes)) ** 0.5
    assert 1e-4 < rounding < 0.2
    assert sum(made) < 3 * sum(passes)
    # Two errors apart: at most the sum of their sizes, 1 + √3.
    assert (sum(apart) / len(apart)) ** 0.5 < (1 + 3**0.5) * rounding
    assert other > 2 * rounding
