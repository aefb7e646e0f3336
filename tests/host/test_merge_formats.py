"""Each format and each architecture: what a merge reads is what the host's own loader applies."""

from __future__ import annotations

import pytest
import torch

ARCHITECTURES = ["sdxl", "sd1.5", "z-image", "qwen-image", "flux2"]


@pytest.fixture(scope="module")
def models(kit):
    made = {}

    def model(name):
        if name not in made:
            made[name] = kit.architectures.make(name)[0]
        return made[name]

    yield model
    made.clear()
    _STATES.clear()


_STATES = {}


def state_of(model):
    """Its weights by name; asked for once, as collecting them takes a second."""
    if id(model) not in _STATES:
        _STATES[id(model)] = (model, model.model.state_dict())
    return _STATES[id(model)][1]


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def adapter(kind, stem, shape, seed):
    """One adapter of a kind for a weight of a shape, in LoRA-file keys."""
    out, inner, kernel = shape[0], shape[1], tuple(shape[2:])
    ones, flat = (1,) * len(kernel), inner * max(1, torch.Size(kernel).numel() if kernel else 1)
    if kind == "lora":
        found = {"lora_down.weight": random(seed, 3, inner, *kernel), "lora_up.weight": random(seed + 1, out, 3, *ones)}
    elif kind == "peft":
        found = {"lora_A.weight": random(seed, 3, inner, *kernel), "lora_B.weight": random(seed + 1, out, 3, *ones)}
        return {f"{stem}.{end}": value for end, value in found.items()}
    elif kind == "tucker":
        found = {"lora_down.weight": random(seed, 2, inner, 1, 1), "lora_up.weight": random(seed + 1, out, 2, 1, 1),
                 "lora_mid.weight": random(seed + 2, 2, 2, *kernel)}
    elif kind == "loha":
        found = {"hada_w1_a": random(seed, out, 2), "hada_w1_b": random(seed + 1, 2, flat),
                 "hada_w2_a": random(seed + 2, out, 2), "hada_w2_b": random(seed + 3, 2, flat)}
    else:
        found = {"lokr_w1": random(seed, 2, 2), "lokr_w2_a": random(seed + 1, out // 2, 3),
                 "lokr_w2_b": random(seed + 2, 3, flat // 2)}
    return {f"{stem}.{end}": value for end, value in found.items()} | {f"{stem}.alpha": torch.tensor(2.0)}


def applied(host, model, lora, strength=1.0):
    """What the host's loader makes of a LoRA: the change of each whole weight."""
    patches = host.comfy.lora.load_lora(dict(lora), host.comfy.lora.model_lora_keys_unet(model.model, {}))
    state = state_of(model)
    found = {}
    for target, patch in patches.items():
        key, offset = (target, None) if isinstance(target, str) else target[:2]
        base = found.get(key, torch.zeros(state[key].shape))
        found[key] = host.comfy.lora.calculate_weight([(strength, patch, 1.0, offset, None)], base, key)
    return found


def stems(host, model):
    """The first name of each target that the host knows, slices of fused weights among them."""
    found = {}
    for name, target in host.comfy.lora.model_lora_keys_unet(model.model, {}).items():
        found.setdefault(target, name)
    return found


def shape_of(model, target):
    key, cut = (target, None) if isinstance(target, str) else target[:2]
    shape = list(state_of(model)[key].shape)
    if cut is not None:
        shape[cut[0]] = cut[2]
    return shape


def sample(host, model, count=24):
    """Some targets: slices first, then whole weights spread over the model, one of each key."""
    known = {t: n for t, n in stems(host, model).items()
             if (t if isinstance(t, str) else t[0]) in state_of(model)
             and (t if isinstance(t, str) else t[0]).endswith("weight") and len(shape_of(model, t)) in (2, 4)
             and min(shape_of(model, t)[:2]) >= 4 and shape_of(model, t)[0] % 2 == 0 and shape_of(model, t)[1] % 2 == 0}
    slices = [t for t in known if not isinstance(t, str)][:9]
    fused = {t[0] for t in slices}
    whole = [t for t in known if isinstance(t, str) and t not in fused]
    step = max(1, len(whole) // count)
    return {t: known[t] for t in slices + whole[::step][:count]}


CASES = [(name, kind) for name in ARCHITECTURES for kind in ("lora", "peft", "loha", "lokr", "tucker")
         if kind != "tucker" or name.startswith("sd")]  # the others have no convolution


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_sum_is_what_the_host_applies(name, kind, host, run_node, models):
    model = models(name)
    lora = {}
    for i, (target, stem) in enumerate(sample(host, model).items()):
        shape = shape_of(model, target)
        if kind == "tucker" and len(shape) != 4:
            continue
        lora |= adapter(kind, stem, shape, 10 * i)
    due = applied(host, model, lora, 1.5)
    merged, report, _ = run_node("StyleLoomMergeLoRAs", loras={"lora0": lora, "lora1": lora}, strengths="1, 0.5",
                                 method="sum", model=model)
    found = applied(host, model, merged)
    assert set(found) == set(due), report
    # A convolution is written as one, whatever the file had it as: (rank, in, kernel).
    kernels = {len(t.shape) for key, t in merged.items() if key.endswith((".lora_down.weight", ".lora_A.weight"))}
    assert kernels == ({4} if kind == "tucker" else {2, 4} if name.startswith("sd") else {2})
    for key, value in due.items():
        assert (found[key] - value).norm() <= 1e-4 * value.norm(), key
    _, _, said = run_node("StyleLoomApplyLoRA", model=model, lora=merged, strength=1.0)
    assert "strength 1" in said


def test_slices_and_whole_weights_of_one_layer_meet(host, run_node, models):
    model = models("z-image")
    key = "diffusion_model.layers.3.attention.qkv.weight"
    out, inner = shape_of(model, key)
    whole = adapter("peft", "diffusion_model.layers.3.attention.qkv", (out, inner), 1)
    sliced = {}
    for i, side in enumerate(("to_q", "to_v")):
        sliced |= adapter("lora", f"diffusion_model.layers.3.attention.{side}", (out // 3, inner), 20 + i)
    merged, _, _ = run_node("StyleLoomMergeLoRAs", loras={"lora0": whole, "lora1": sliced}, method="sum", model=model)
    due = applied(host, model, whole)[key] + applied(host, model, sliced)[key]
    assert torch.allclose(applied(host, model, merged)[key], due, atol=1e-5)


PEFT = ["base_model.model.{}", "unet.base_model.model.{}", "unet.{}", "unet.unet.{}", "{}"]


@pytest.mark.parametrize("form", PEFT)
@pytest.mark.parametrize("name", ["sdxl", "sd1.5"])
def test_spellings_that_the_host_does_not_know(name, form, host, run_node, models):
    model = models(name)
    known = host.comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    lora, due = {}, {}
    chosen = [k for k in known if k.endswith("weight") and ".to_" in k][::37]
    for i, dotted in enumerate(chosen):
        stem = dotted.removesuffix(".weight")
        out, inner = shape_of(model, f"diffusion_model.{known[dotted]}")
        lora |= {form.format(stem) + ".lora_A.default.weight": random(i, 2, inner),
                 form.format(stem) + ".lora_B.default.weight": random(i + 1, out, 2)}
        due[f"diffusion_model.{known[dotted]}"] = random(i + 1, out, 2) @ random(i, 2, inner)
    merged, _, _ = run_node("StyleLoomMergeLoRAs", loras={"lora0": lora, "lora1": lora}, strengths="1, 0", model=model)
    found = applied(host, model, merged)
    assert set(found) == set(due)
    assert all(torch.allclose(found[key], due[key], atol=1e-5) for key in due)


def test_biases_norms_and_differences_are_added_up(host, run_node, models):
    model = models("sdxl")
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    size = shape_of(model, "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.weight")
    lora = adapter("lora", stem, size, 1) | {f"{stem}.diff_b": random(4, size[0]),
                                             "lora_unet_input_blocks_4_1_norm.w_norm": random(5, size[0]),
                                             "lora_unet_input_blocks_4_1_norm.b_norm": random(6, size[0])}
    merged, report, _ = run_node("StyleLoomMergeLoRAs", loras={"lora0": lora, "lora1": lora}, strengths="1, 0.5",
                                 model=model)
    due, found = applied(host, model, lora, 1.5), applied(host, model, merged)
    assert set(due) == set(found) and len(due) == 4 and "3 full differences" in report
    assert all(torch.allclose(found[key], due[key], atol=1e-5) for key in due)


def test_text_encoders_with_clip_and_without(host, run_node, kit, models):
    model, clip = models("sdxl"), kit.text.sdxl_text()
    names = host.comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    state = clip.cond_stage_model.state_dict()
    lora = {}
    for i, stem in enumerate(["lora_te1_text_model_encoder_layers_2_mlp_fc1",
                              "lora_te2_text_model_encoder_layers_30_self_attn_v_proj"]):
        lora |= adapter("lora", stem, state[names[stem]].shape, i)
    unet = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    lora |= adapter("lora", unet, shape_of(model, host.comfy.lora.model_lora_keys_unet(model.model, {})[unet]), 9)
    results = [run_node("StyleLoomMergeLoRAs", loras={"lora0": lora, "lora1": lora}, method="average", **more)[0]
               for more in ({}, {"model": model}, {"model": model, "clip": clip})]
    assert all(set(found) == set(lora) for found in results)
    said = run_node("StyleLoomApplyLoRA", model=model, clip=clip, lora=results[0], strength=1.0)[2]
    assert "1 of 3 patches" in said and "2 patches on the text encoder" in said
