"""LoRAs and windows that Asymmetric CFG refuses, in words that name them, and what it leaves out and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from shared_models import ONE


def first(lora):
    return next(name for name in lora if name.endswith("lora_down.weight"))


def test_a_lora_of_another_architecture(bench, kit):
    other = kit.adapters.make(kit.architectures.make_model("flux2", 1, short=True), "lora", rank=2)
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
    assert "5 keys are for a text encoder" in bench.report and "clip of the negative prompt" in bench.report
    assert sum("5 keys are for a text encoder" in record.getMessage() for record in caplog.records) == 1
    assert torch.equal(made, bench.asymmetric(sampling=ONE, negative_lora=lora))
