"""ZipRank Merge end to end in the host: from two files to a patched model."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

CONTENT, STYLE = "kit/sdxl_content.safetensors", "kit/sdxl_style.safetensors"


@pytest.fixture(scope="module")
def loras(run_node):
    return tuple(run_node("StyleLoomLoadLoRA", lora_name=name)[0] for name in (CONTENT, STYLE))


@pytest.fixture(scope="module")
def sdxl(kit):
    return kit.architectures.make("sdxl")


def deltas(host, model, lora, strength=1.0):
    """What the host's own loader adds to each weight."""
    patches = host.comfy.lora.load_lora(dict(lora), host.comfy.lora.model_lora_keys_unet(model.model, {}))
    state = model.model.state_dict()
    return {
        key: host.comfy.lora.calculate_weight(
            [(strength, patch, 1.0, None, None)], torch.zeros_like(state[key], dtype=torch.float32), key
        )
        for key, patch in patches.items()
    }


def content_hash(lora) -> str:
    """SHA-256 of every tensor behind a line that names it, in the order of the names."""
    parts = []
    for key in sorted(lora):
        head = f"{key}\0{lora[key].dtype}\0{list(lora[key].shape)}\0"
        parts += [head.encode(), lora[key].contiguous().numpy().tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def merge(run_node, loras, **inputs):
    return run_node("StyleLoomZipRankMerge", content_lora=loras[0], style_lora=loras[1], **inputs)


def test_separation_zero_is_loading_both(host, run_node, loras, sdxl):
    merged, report, masks = merge(run_node, loras, separation=0.0, content_strength=0.8, style_strength=1.2)
    one, two = deltas(host, sdxl[0], loras[0], 0.8), deltas(host, sdxl[0], loras[1], 1.2)
    found = deltas(host, sdxl[0], merged)
    assert set(found) == set(one) == set(two) and len(found) == 700
    for key, value in found.items():
        due = one[key] + two[key]
        assert (value - due).norm() < 2e-3 * due.norm()
    assert masks.shape[0] == 1 and masks.shape[-1] == 3 and 0 <= float(masks.min()) and float(masks.max()) <= 1


def test_the_result_patches_the_model_and_carries_its_recipe(run_node, loras, sdxl):
    merged, report, _ = merge(run_node, loras)
    assert len(merged) == 3 * 700 and all(key.startswith("lora_unet_") for key in merged)
    model, _, said = run_node("StyleLoomApplyLoRA", model=sdxl[0], lora=merged, strength=1.0)
    assert "700 of 700" in said
    recipe = json.loads(merged.metadata["styleloom.recipe"])
    assert [source["file"] for source in recipe["loras"]] == [CONTENT, STYLE]
    assert [source["sha256"] for source in recipe["loras"]] == [content_hash(lora) for lora in loras]
    assert recipe["mode"] == "fast" and recipe["separation"] == 0.7 and len(recipe["effective_ranks"]) == 700
    assert "700 shared" in report and "own-input loss" in report


def test_with_and_without_the_model_the_same(run_node, loras, sdxl):
    one, two = merge(run_node, loras)[0], merge(run_node, loras, model=sdxl[0], clip=sdxl[1])[0]
    assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)
