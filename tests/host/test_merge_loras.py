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
    assert max(ranks) < 16 and "energy that the limit of the rank keeps" in report


@pytest.mark.parametrize(("inputs", "words"), [
    ({"strengths": "1"}, "it has 1 number for 2 LoRAs"), ({"strengths": "a, b"}, "'a' is no number"),
    ({"strengths": "1, inf"}, "'inf' is not a finite number"),
    ({"strengths": "nan, 1"}, "'nan' is not a finite number"),
    ({"strengths": "1, 2, 3"}, "it has 3 numbers for 2 LoRAs")])
def test_bad_strengths(inputs, words, run_node, loras):
    with pytest.raises(ValueError, match=words):
        merge(run_node, loras, **inputs)


def applied(host, model, lora, strength=1.0):
    """What the host's own loader makes of a LoRA: the change of each whole weight."""
    state = model.model.state_dict()
    found = {}
    for target, patch in host.comfy.lora.load_lora(
        dict(lora), host.comfy.lora.model_lora_keys_unet(model.model, {})
    ).items():
        key, offset, function = (*target, None)[:3] if isinstance(target, tuple) else (target, None, None)
        base = found.get(key, torch.zeros(state[key].shape))
        found[key] = host.comfy.lora.calculate_weight([(strength, patch, 1.0, offset, function)], base, key)
    return found


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("other", ["transformer.norm_out.linear", "diffusion_model.final_layer.adaLN_modulation.1"])
def test_a_final_modulation_whose_halves_the_host_swaps(other, host, run_node, kit):
    """Under diffusers' name in one LoRA, and under either name in the other."""
    model = kit.architectures.make("flux2")[0]
    key = "diffusion_model.final_layer.adaLN_modulation.1.weight"
    out, inner = model.model.state_dict()[key].shape
    one = {"transformer.norm_out.linear.lora_A.weight": random(1, 2, inner),
           "transformer.norm_out.linear.lora_B.weight": random(2, out, 2)}
    two = {f"{other}.lora_A.weight": random(3, 3, inner), f"{other}.lora_B.weight": random(4, out, 3)}
    due = applied(host, model, one)[key] + applied(host, model, two)[key]
    merged = merge(run_node, [one, two], method="sum", model=model)[0]
    assert torch.allclose(applied(host, model, merged)[key], due, atol=1e-5)
    merged = run_node("StyleLoomZipRankMerge", content_lora=one, style_lora=two, separation=0.0, model=model)[0]
    assert torch.allclose(applied(host, model, merged)[key], due, atol=1e-4)


def test_a_low_rank_change_and_a_full_difference_of_one_layer_both_act(host, run_node, model):
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    key = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    out, inner = model.model.state_dict()[key].shape
    one = {f"{stem}.lora_down.weight": random(1, 2, inner), f"{stem}.lora_up.weight": random(2, out, 2)}
    two = {f"{stem}.diff": random(3, out, inner)}
    due = applied(host, model, one)[key] + 0.5 * applied(host, model, two)[key]
    merged, report, _ = merge(run_node, [one, two], strengths="1, 0.5", method="NP-LoRA", model=model)
    assert torch.allclose(applied(host, model, merged)[key], due, atol=1e-5)
    assert "1 layers have a low-rank change in one LoRA and a full difference in another" in report
    merged = run_node("StyleLoomZipRankMerge", content_lora=one, style_lora=two, style_strength=0.5, model=model)[0]
    assert torch.allclose(applied(host, model, merged)[key], due, atol=1e-5)
    halved = merge(run_node, [one, two], strengths="1, 0.5", method="average", model=model)[0]
    assert torch.allclose(applied(host, model, halved)[key], due / 2, atol=1e-5)


def test_one_lora_is_not_enough(run_node, loras):
    with pytest.raises(ValueError, match="two or more"):
        merge(run_node, loras[:1])
