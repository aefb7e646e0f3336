"""IP-Adapter files: every published layout is recognised by keys and shapes, everything else is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.unet.architecture import SD15, SDXL
from styleloom.weights.ip_adapter.formats import recognise

LEVELS = {SDXL: [640] * 4 + [1280] * 50 + [640] * 6 + [1280] * 10,
          SD15: [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [1280]}  # fmt: skip


def empty(*shape):
    """A tensor that has a shape and no memory: recognition reads no values."""
    return torch.empty(shape, device="meta")


def layers(architecture, cross):
    return {f"{2 * i + 1}.to_{part}_ip.weight": empty(width, cross)
            for i, width in enumerate(LEVELS[architecture]) for part in "kv"}  # fmt: skip


def base(width, tokens, cross):
    return {"proj.weight": empty(tokens * cross, width), "proj.bias": empty(tokens * cross),
            "norm.weight": empty(cross), "norm.bias": empty(cross)}  # fmt: skip


def full(width, cross):
    return {"proj.0.weight": empty(width, width), "proj.0.bias": empty(width), "proj.2.weight": empty(cross, width),
            "proj.2.bias": empty(cross), "proj.3.weight": empty(cross), "proj.3.bias": empty(cross)}  # fmt: skip


def plus(width, dim, heads, cross, tokens=16, depth=4):
    made = {"latents": empty(1, tokens, dim), "proj_in.weight": empty(dim, width), "proj_in.bias": empty(dim),
            "proj_out.weight": empty(cross, dim), "proj_out.bias": empty(cross), "norm_out.weight": empty(cross),
            "norm_out.bias": empty(cross)}  # fmt: skip
    for i in range(depth):
        for part in ("0.norm1", "0.norm2", "1.0"):
            made |= {f"layers.{i}.{part}.weight": empty(dim), f"layers.{i}.{part}.bias": empty(dim)}
        made |= {f"layers.{i}.0.to_q.weight": empty(64 * heads, dim),
                 f"layers.{i}.0.to_kv.weight": empty(128 * heads, dim),
                 f"layers.{i}.0.to_out.weight": empty(dim, 64 * heads),
                 f"layers.{i}.1.1.weight": empty(4 * dim, dim),
                 f"layers.{i}.1.3.weight": empty(dim, 4 * dim)}  # fmt: skip
    return made


# Sizes as published: h94/IP-Adapter, and Kwai-Kolors/Kolors-IP-Adapter-Plus.
PUBLISHED = {
    "ip-adapter_sd15, ip-adapter_sd15_light": (base(1024, 4, 768), SD15, 768, "base", 4, "ViT-H"),
    "ip-adapter_sd15_vit-G": (base(1280, 4, 768), SD15, 768, "base", 4, "ViT-bigG"),
    "ip-adapter-plus_sd15, plus-face_sd15": (plus(1280, 768, 12, 768), SD15, 768, "plus", 16, "ViT-H"),
    "ip-adapter-full-face_sd15": (full(1280, 768), SD15, 768, "full", 0, "ViT-H"),
    "ip-adapter_sdxl": (base(1280, 4, 2048), SDXL, 2048, "base", 4, "ViT-bigG"),
    "ip-adapter_sdxl_vit-h": (base(1024, 4, 2048), SDXL, 2048, "base", 4, "ViT-H"),
    "ip-adapter-plus_sdxl_vit-h, plus-face": (plus(1280, 1280, 20, 2048), SDXL, 2048, "plus", 16, "ViT-H"),
    "Kolors-IP-Adapter-Plus": (plus(1024, 2048, 12, 2048), SDXL, 2048, "plus", 16, "ViT-L-336"),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("layout", ["nested", "flat", "adapter_modules"])
def test_published_files(name, layout):
    proj, architecture, cross, kind, tokens, encoder = PUBLISHED[name]
    ip = layers(architecture, cross)
    given = {"image_proj": proj, "ip_adapter": ip} if layout == "nested" else {
        **{f"image_proj.{key}": value for key, value in proj.items()},
        **{f"{'ip_adapter' if layout == 'flat' else layout}.{key}": value for key, value in ip.items()},
    }  # fmt: skip
    found = recognise("any name", given)
    assert (found.kind, found.tokens, found.encoder.name, found.cross) == (kind, tokens, encoder, cross)
    assert found.architecture is architecture and len(found.layers) == len(architecture.layers)
    assert found.feature == ("image_embeds" if kind == "base" else "penultimate_hidden_states")
    assert encoder in found.label and ("Kolors" in found.label) == ("Kolors" in name)


FACES = {
    "ip-adapter-faceid_sd15 (LoRA beside)": ({"proj.0.weight": empty(1024, 512), "proj.0.bias": empty(1024),
                                             "proj.2.weight": empty(3072, 1024), "proj.2.bias": empty(3072),
                                             "norm.weight": empty(768), "norm.bias": empty(768)},
                                            {"0.to_q_lora.down.weight": empty(128, 320)}),
    "ip-adapter-faceid-portrait_sd15": ({"proj.0.weight": empty(1024, 512), "proj.0.bias": empty(1024),
                                        "proj.2.weight": empty(12288, 1024), "proj.2.bias": empty(12288),
                                        "norm.weight": empty(768), "norm.bias": empty(768)}, {}),
    "ip-adapter-faceid-plusv2": ({"proj.0.weight": empty(1024, 512),
                                  "perceiver_resampler.proj_in.weight": empty(768, 1280)}, {}),
    # Resamplers as those of plus adapters, over one face vector.
    "InstantID": (plus(512, 1280, 20, 768), {}),
    "ip-adapter-faceid-portrait_sdxl_unnorm": (plus(512, 1280, 20, 768, tokens=16), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FACES)
def test_faces_are_refused_with_the_reason(name):
    proj, more = FACES[name]
    with pytest.raises(StyleLoomError, match="insightface"):
        recognise(name, {"image_proj": proj, "ip_adapter": layers(SD15, 768) | more})


def mlp(width, tokens, cross):
    return {"proj.0.weight": empty(2 * width, width), "proj.0.bias": empty(2 * width),
            "proj.2.weight": empty(tokens * cross, 2 * width), "proj.2.bias": empty(tokens * cross),
            "norm.weight": empty(cross), "norm.bias": empty(cross)}  # fmt: skip


def test_a_few_keys_too_many_are_reported_and_left_out():
    """Everything that is needed is there: what else the file holds is named, and the rest is as without it."""
    ip, more = GOOD[1] | {"7.to_q_ip.weight": empty(1, 1)}, {"optimizer": empty(1), "steps": {"count": empty(1)}}
    found = recognise("x", {"image_proj": GOOD[0] | {"mixer.weight": empty(1)}, "ip_adapter": ip, **more})
    assert found.ignored == ("optimizer", "steps", "ip_adapter.7.to_q_ip.weight", "image_proj.mixer.weight")
    assert found.layers.keys() == recognise("x", {"image_proj": GOOD[0], "ip_adapter": GOOD[1]}).layers.keys()
    every = {f"{number}.norm_ip.weight": empty(1) for number in found.layers}
    with pytest.raises(StyleLoomError, match="70 keys belong to no part of an IP-Adapter"):
        recognise("x", {"image_proj": GOOD[0], "ip_adapter": GOOD[1] | every})


GOOD = base(1024, 4, 2048), layers(SDXL, 2048)
BROKEN = {
    "a checkpoint": ({"model.diffusion_model.out.0.weight": empty(4)}, "this is no IP-Adapter"),
    "nothing": ({}, "this is no IP-Adapter"),
    "half a layer": ({"image_proj": GOOD[0], "ip_adapter": {k: v for k, v in GOOD[1].items() if k[:6] != "7.to_k"}},
                     "7.to_k_ip.weight is missing"),
    "layers cut off": ({"image_proj": GOOD[0], "ip_adapter": {
        k: v for k, v in GOOD[1].items() if int(k.split(".")[0]) < 100}}, "it has 50 layers"),
    "another width": ({"image_proj": GOOD[0], "ip_adapter": GOOD[1] | {"7.to_v_ip.weight": empty(640, 1024)}},
                      "7.to_k_ip.weight is"),
    "no layers": ({"image_proj": GOOD[0], "ip_adapter": {"1.norm.weight": empty(1)}}, "no layer that is known"),
    "no bias": ({"image_proj": {k: v for k, v in GOOD[0].items() if k != "proj.bias"}, "ip_adapter": GOOD[1]},
                "image_proj.proj.bias is missing"),
    "a bias of another size": ({"image_proj": GOOD[0] | {"norm.bias": empty(5)}, "ip_adapter": GOOD[1]},
                               r"image_proj.norm.bias is \[5\] where \[2048\] is due"),
    "an unknown projection": ({"image_proj": {"mixer.weight": empty(1)}, "ip_adapter": GOOD[1]}, "unknown kind"),
    "tokens that do not divide": ({"image_proj": GOOD[0] | {"proj.weight": empty(8000, 1024)}, "ip_adapter": GOOD[1]},
                                  "no multiple of 2048"),
    "not a tensor": ({"image_proj": GOOD[0] | {"proj.bias": "x"}, "ip_adapter": GOOD[1]}, "is no tensor"),
    "a resampler without a layer's norm": ({"image_proj": {
        k: v for k, v in plus(1280, 1280, 20, 2048).items() if k != "layers.2.0.norm1.bias"}, "ip_adapter": GOOD[1]},
        "layers.2.0.norm1.bias is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_name_the_key(name):
    tensors, words = BROKEN[name]
    with pytest.raises(StyleLoomError, match=words) as error:
        recognise("file.bin", tensors)
    assert error.value.found.startswith("file.bin: ") and error.value.fix


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_loss_or_change_of_a_key_is_noticed(data):
    name = data.draw(st.sampled_from(sorted(PUBLISHED)))
    proj, architecture, cross, *_ = PUBLISHED[name]
    parts = {"image_proj": dict(proj), "ip_adapter": layers(architecture, cross)}
    part = data.draw(st.sampled_from(sorted(parts)))
    key = data.draw(st.sampled_from(sorted(parts[part])))
    value = parts[part].pop(key)
    if data.draw(st.booleans()):
        parts[part][key] = empty(*(side + 1 for side in value.shape))
    elif data.draw(st.booleans()):
        parts[part][f"x.{key}"] = value
    with pytest.raises(StyleLoomError):
        recognise("file", parts)
