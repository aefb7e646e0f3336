"""LoRA Block Filter in the real host: only the chosen layers of the model are patched, with the strength asked for."""

from __future__ import annotations

import pytest
import torch

PLACES = {  # preset → what the host calls these layers
    "style blocks": ["output_blocks.1.1."],
    "content blocks": ["output_blocks.0.1."],
    "layout": ["input_blocks.8.1."],
    "attention only": ["attn1.", "attn2."],
}


@pytest.fixture(scope="module")
def model(run_node):
    return run_node("StyleLoomKitModel", architecture="sdxl", seed=0)[0]


@pytest.fixture(scope="module")
def lora(run_node):
    return run_node("StyleLoomLoadLoRA", lora_name="kit/sdxl_paper.safetensors")[0]


def patched(run_node, model, lora, preset, **options):
    made, report = run_node("StyleLoomLoRABlockFilter", lora=lora, preset=preset, **options)
    return run_node("StyleLoomApplyLoRA", model=model, lora=made)[0].patches, report


def change(model, patches, key):
    """What the host adds to a weight."""
    import comfy.lora

    weight = model.model.state_dict()[key].clone()
    before = weight.clone()
    return comfy.lora.calculate_weight(patches[key], weight, key) - before


@pytest.mark.parametrize("preset", PLACES)
def test_only_these_layers(preset, run_node, model, lora):
    whole = run_node("StyleLoomApplyLoRA", model=model, lora=lora)[0].patches
    found, report = patched(run_node, model, lora, preset)
    due = {key for key in whole if any(place in key for place in PLACES[preset])}
    assert set(found) == due and f"inside: {len(due)} of 560 layers" in report
    assert preset == "attention only" or len(due) == 80


def test_strengths_are_those_of_the_hosts_arithmetic(run_node, model, lora):
    whole = run_node("StyleLoomApplyLoRA", model=model, lora=lora)[0].patches
    found, _ = patched(run_node, model, lora, "style blocks", inside=0.5, outside=-0.25)
    assert set(found) == set(whole)
    for key in list(whole)[::37]:
        strength = 0.5 if "output_blocks.1.1." in key else -0.25
        assert torch.allclose(change(model, found, key), strength * change(model, whole, key), rtol=1e-3, atol=1e-5)


def test_the_two_halves_are_the_whole(run_node, model, lora):
    """Inside alone plus outside alone is the LoRA as it was."""
    inside, _ = patched(run_node, model, lora, "style blocks")
    outside, _ = patched(run_node, model, lora, "style blocks", inside=0.0, outside=1.0)
    whole = run_node("StyleLoomApplyLoRA", model=model, lora=lora)[0].patches
    assert set(inside) | set(outside) == set(whole) and not set(inside) & set(outside)
    for key in list(whole)[::53]:
        assert torch.equal(change(model, inside if key in inside else outside, key), change(model, whole, key))
