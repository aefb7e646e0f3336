"""Beside what else a user has on the model and its conditionings; and LoRAs that are refused."""

from __future__ import annotations

import logging

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


def first(lora):
    return next(name for name in lora if name.endswith("lora_down.weight"))


def test_a_lora_of_another_architecture(bench, kit):
    other = kit.adapters.make(kit.architectures.make("flux2", 1)[0], "lora", rank=2)
    with pytest.raises(ValueError) as error:
        bench.guider(positive_lora=other)
    message = str(error.value)
    assert f"{len(other)} of the positive LoRA's {len(other)} keys find no place in this BaseModel model" in message
    assert all(name in message for name in list(other)[:3])
    assert f"and {len(other) - 3} more" in message


def test_a_lora_of_another_size(bench):
    lora = bench.lora(1, contains="attn2")
    name = first(lora)
    was = lora[name].shape
    lora[name] = torch.randn(was[0], was[1] + 1)
    with pytest.raises(ValueError) as error:
        bench.guider(negative_lora=lora)
    message, weight = str(error.value), bench.model.model.state_dict()[name.replace("lora_down.weight", "weight")]
    assert "negative LoRA" in message and name.removesuffix(".lora_down.weight") in message
    assert str(list(weight.shape)) in message and str([weight.shape[0], was[1] + 1]) in message


def test_numbers_that_are_none(bench):
    lora = bench.lora(1, contains="attn2")
    name = first(lora)
    lora[name] = lora[name].clone()
    lora[name].view(-1)[3] = float("nan")
    with pytest.raises(ValueError) as error:
        bench.guider(positive_lora=lora)
    assert name in str(error.value) and "positive LoRA" in str(error.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({}, "it is empty"),
        (
            {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)},
            "all of its 1 keys are for a text",
        ),
        ("a file name", "positive_lora is a str"),
        (("a", "b"), "positive_lora is a tuple"),
    ],
)
def test_no_lora_at_all(lora, message, bench):
    with pytest.raises(ValueError, match=message):
        bench.guider(positive_lora=lora)


@pytest.mark.parametrize("window", ((0.6, 0.4), (0.5, 0.5)))
@pytest.mark.parametrize("side", ("positive", "negative"))
def test_a_window_without_room(window, side, bench):
    given = {f"{side}_lora": bench.lora(1, contains="attn2"), f"{side}_start_percent": window[0]}
    with pytest.raises(ValueError, match=f"{side}_lora: start_percent .* is not before end_percent"):
        bench.guider(**given, **{f"{side}_end_percent": window[1]})


def test_windows_of_stack_and_guider_that_do_not_meet_are_told(bench, run_node):
    """Each of them is fine; together they leave no step in which the LoRA acts."""
    stack = run_node("StyleLoomLoRAStack", lora=bench.lora(1, contains="attn2"), strength=1.0, end_percent=0.3)[0]
    bench.guider(positive_lora=stack, positive_start_percent=0.6)
    assert "the model as it is" in bench.report


def test_keys_of_a_text_encoder_are_told(bench, distance, caplog):
    lora = bench.lora(1, contains="attn2")
    text = {f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.lora_up.weight": torch.ones(2, 2) for i in range(5)}
    with caplog.at_level(logging.WARNING):
        made = bench.asymmetric(sampling=ONE, negative_lora=lora | text)
    assert "5 keys for a text encoder" in bench.report and "clip of the negative prompt" in bench.report
    assert sum("5 keys for a text encoder" in record.getMessage() for record in caplog.records) == 1
    assert torch.equal(made, bench.asymmetric(sampling=ONE, negative_lora=lora))
