"""Merge LoRAs in the host, on every method."""

from __future__ import annotations

import json

import pytest
import torch

CONTENT, STYLE = "kit/sdxl_content.safetensors", "kit/sdxl_style.safetensors"
METHODS = ["sum", "average", "SVD", "TIES", "DARE", "ZipLoRA columns", "NP-LoRA", "router"]


@pytest.fixture(scope="module")
def loras(run_node):
    return tuple(run_node("StyleLoomLoadLoRA", lora_name=name)[0] for name in (CONTENT, STYLE))


@pytest.fixture(scope="module")
def model(kit):
    return kit.diffusion.sdxl_small()


def merge(run_node, loras, **inputs):
    return run_node("StyleLoomMergeLoRAs", loras={f"lora{i}": lora for i, lora in enumerate(loras)}, **inputs)


def part(lora, word):
    return {key: value for key, value in lora.items() if word in key}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_loads_in_the_host(method, run_node, loras, model):
    some = [part(lora, words) for lora, words in zip(loras, ("input_blocks_4_1_", "down_blocks_1_attentions_0_"))]
    merged, report, masks = merge(run_node, some, method=method)
    count = len(some[0]) // 3
    assert f"{count} shared" in report and f"Merge LoRAs: {method}" in report
    _, _, said = run_node("StyleLoomApplyLoRA", model=model, lora=merged, strength=1.0)
    assert f"{count} of {count}" in said
    recipe = json.loads(merged.metadata["styleloom.recipe"])
    assert recipe["method"] == method and len(recipe["loras"]) == 2
    assert masks.ndim == 4
    again = merge(run_node, some, method=method)[0]
    assert all(torch.equal(again[key], merged[key]) for key in merged), "same in, same out"


def test_three_loras_and_strengths(run_node, loras):
    some = [part(loras[0], "input_blocks_4_1_transformer_blocks_0_attn1_to_q")] * 3
    merged, _, _ = merge(run_node, some, strengths="1, 0.5; -2", max_rank=4)
    (down, up) = (next(v for k, v in merged.items() if end in k) for end in ("lora_down", "lora_up"))
    one_down, one_up = (next(v for k, v in some[0].items() if end in k) for end in ("lora_down", "lora_up"))
    due = -0.5 * (one_up.float() @ one_down.float())
    u, s, vh = torch.linalg.svd(due)
    assert down.shape[0] == 4
    assert torch.allclose(up.float() @ down.float(), (u[:, :4] * s[:4]) @ vh[:4], atol=2e-3 * float(s[0]))


def test_energy(run_node, loras):
    some = [part(lora, words) for lora, words in zip(loras, ("middle_block_1_tra", "mid_block_attentions_0_tra"))]
    merged, report, _ = merge(run_node, some, energy=0.9)
    ranks = {value.shape[0] for key, value in merged.items() if "lora_down" in key}
    assert max(ranks) < 16 and "energy that the rank limit keeps" in report


@pytest.mark.parametrize(("inputs", "words"), [
    ({"strengths": "1"}, "1 numbers for 2 LoRAs"), ({"strengths": "a, b"}, "could not convert"),
    ({"strengths": "nan, 1"}, "strengths is")])
def test_bad_strengths(inputs, words, run_node, loras):
    with pytest.raises(ValueError, match=words):
        merge(run_node, loras, **inputs)


def test_one_lora_is_not_enough(run_node, loras):
    with pytest.raises(ValueError, match="two or more"):
        merge(run_node, loras[:1])
