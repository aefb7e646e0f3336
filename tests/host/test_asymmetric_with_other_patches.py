"""Asymmetric CFG beside other things that a user has on the model and the conditionings: weight hooks, wrappers,
attention patches, object patches, ranges, noise masks."""

from __future__ import annotations

import pytest
import torch
from shared_models import BOUND, ONE


@pytest.fixture(scope="module")
def sides(bench):
    style, gray = bench.lora(1), bench.lora(2, rank=3)
    return {"positive_lora": style, "negative_lora": gray}, ([(style, 1.0)], [(gray, 1.0)])


@pytest.mark.parametrize("where", ("positive", "negative", "both"))
def test_a_users_own_weight_hooks(where, bench, sides, distance, host):
    ours, (positive, negative) = sides
    own, prompts = bench.lora(9, contains="attn2"), {}
    hooks = host.comfy.hooks.create_hook_lora(own, 0.7, 0.0)
    for side in ("positive", "negative"):
        if where in (side, "both"):
            prompts[side] = host.comfy.hooks.set_hooks_for_conditioning(getattr(bench, side), hooks)
    made = bench.asymmetric(**prompts, **ours)
    more = [(own, 0.7)]
    expected = bench.truth([*positive, *more * ("positive" in prompts)], [*negative, *more * ("negative" in prompts)])
    assert distance(made, expected) < BOUND


def test_a_users_hooks_beside_our_own(bench, distance, host):
    lora = bench.lora(1, kind="dora", contains="attn2.to_k") | bench.lora(1, contains="attn1")
    own = bench.lora(9, contains="attn2.to_v")
    hooks = host.comfy.hooks.create_hook_lora(own, 0.7, 0.0)
    positive = host.comfy.hooks.set_hooks_for_conditioning(bench.positive, hooks)
    made = bench.asymmetric(positive=positive, positive_lora=lora)
    assert distance(made, bench.truth([(own, 0.7), (lora, 1.0)])) < BOUND


def test_wrappers_overrides_and_patches_of_the_model_still_run(bench, sides, distance, host):
    seen = []

    def change(model):
        model = model.clone()
        wrappers = host.comfy.patcher_extension.WrappersMP

        def wrap(executor, *args, **kwargs):
            seen.append("wrapper")
            return executor(*args, **kwargs) * 0.9

        def attention(func, *args, **kwargs):
            seen.append("override")
            return func(*args, **kwargs) * 0.95

        def replaced(q, k, v, extra_options):
            seen.append("replace")
            return v

        model.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, "user", wrap)
        model.model_options["transformer_options"]["optimized_attention_override"] = attention
        model.set_model_attn1_replace(replaced, "middle", 0, 0)
        model.set_model_attn2_patch(lambda q, k, v, options: (q * 1.1, k, v))
        return model

    ours, truth = sides
    made = bench.asymmetric(model=change(bench.model), sampling=ONE, **ours)
    assert {"wrapper", "override", "replace"} == set(seen)
    assert distance(made, bench.truth(*truth, sampling=ONE, change=change)) < BOUND


def test_object_patches_and_other_model_sampling(bench, sides, distance, run_node):
    def change(model):
        return run_node("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=True)[0]

    ours, truth = sides
    made = bench.asymmetric(model=change(bench.model), sampling=ONE, **ours)
    assert distance(made, bench.truth(*truth, sampling=ONE, change=change)) < BOUND


def test_a_conditionings_own_range(bench, sides, distance, run_node):
    """A step in which one side has no conditioning at all."""
    late = run_node("ConditioningSetTimestepRange", conditioning=bench.negative, start=0.4, end=1.0)[0]
    ours, truth = sides
    assert distance(bench.asymmetric(negative=late, **ours), bench.routed(*truth, negative=late)) < BOUND


def test_a_noise_mask(bench, sides, distance):
    latent = {"samples": torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))}
    latent["noise_mask"] = torch.zeros(1, 64, 96)
    latent["noise_mask"][:, :, 40:] = 1.0
    ours, truth = sides
    assert distance(bench.asymmetric(latent=latent, **ours), bench.truth(*truth, latent=latent)) < BOUND
