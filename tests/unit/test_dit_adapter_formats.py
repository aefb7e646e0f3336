"""IP-Adapters for FLUX.1 and SD3.5: published sizes are recognised, XLabs's names and diffusers' alike; what is broken is named."""

from __future__ import annotations

import re

import pytest
import torch

from styleloom.weights.dit.style_blocks import FLUX1_ALL, FLUX1_DOUBLE, choose
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.ip_adapter.formats import recognise


def empty(*shape):
    return torch.empty(shape, device="meta")


def xlabs(tokens=16):
    made = {"ip_adapter_proj_model.proj.weight": empty(tokens * 4096, 768),
            "ip_adapter_proj_model.proj.bias": empty(tokens * 4096),
            "ip_adapter_proj_model.norm.weight": empty(4096), "ip_adapter_proj_model.norm.bias": empty(4096)}  # fmt: skip
    for i in range(19):
        for part in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{part}_proj"
            made |= {f"{name}.weight": empty(3072, 4096), f"{name}.bias": empty(3072)}
    return made


def diffusers(tensors):
    """The same under the names that diffusers converts to."""
    made = {}
    for key, value in tensors.items():
        key = key.replace("ip_adapter_proj_model.", "image_proj.")
        key = re.sub(r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj", r"ip_adapter.\1.to_\2_ip", key)
        made[key] = value
    return made


def instantx():
    proj = {"proj.0.weight": empty(2304, 1152), "proj.0.bias": empty(2304), "proj.2.weight": empty(128 * 4096, 2304),
            "proj.2.bias": empty(128 * 4096), "norm.weight": empty(4096), "norm.bias": empty(4096)}  # fmt: skip
    ip = {f"{i}.to_{part}_ip.weight": empty(3072, 4096) for i in range(57) for part in "kv"}
    return {"image_proj": proj, "ip_adapter": ip}


@pytest.mark.parametrize("names", [lambda t: t, diffusers])
@pytest.mark.parametrize("tokens", [4, 16])
def test_xlabs(names, tokens):
    found = recognise("x", names(xlabs(tokens)))
    assert (found.kind, found.tokens, found.encoder.name, found.hidden) == ("XLabs", tokens, "ViT-L", 3072)
    assert found.architecture is FLUX1_DOUBLE and len(found.blocks) == 19 and not found.ignored
    assert f"XLabs IP-Adapter for FLUX.1, {tokens} tokens a picture, encoder ViT-L" == found.label


def test_instantx():
    found = recognise("x", instantx())
    assert (found.kind, found.tokens, found.width, found.hidden) == ("InstantX", 128, 1152, 3072)
    assert found.architecture is FLUX1_ALL and len(found.blocks) == 57 and "SigLIP" in found.label


def instantx_sd3():
    dim, proj = 1280, {"latents": empty(1, 64, 1280)}

    def linear(key, rows, columns):
        return {f"{key}.weight": empty(rows, columns), f"{key}.bias": empty(rows)}

    proj |= linear("proj_in", dim, 1152) | linear("proj_out", 2432, dim)
    proj |= linear("time_embedding.linear_1", dim, 320) | linear("time_embedding.linear_2", dim, dim)
    proj |= {f"norm_out.{end}": empty(2432) for end in ("weight", "bias")}
    for i in range(4):
        proj |= {f"layers.{i}.{norm}.{end}": empty(dim) for norm in ("0.norm1", "0.norm2", "1.0")
                 for end in ("weight", "bias")}  # fmt: skip
        for key, rows, columns in (("0.to_q", dim, dim), ("0.to_kv", 2 * dim, dim), ("0.to_out", dim, dim),
                                   ("1.1", 4 * dim, dim), ("1.3", dim, 4 * dim)):  # fmt: skip
            proj[f"layers.{i}.{key}.weight"] = empty(rows, columns)
        proj |= linear(f"layers.{i}.2.1", 4 * dim, dim)
    ip = {}
    for n in range(38):
        ip |= {f"{n}.to_{part}_ip.weight": empty(2432, 2432) for part in "kv"}
        ip |= {f"{n}.{norm}.weight": empty(64) for norm in ("norm_q", "norm_k", "norm_ip_k")}
        ip |= linear(f"{n}.norm_ip.linear", 4864, 1280)
    return {"image_proj": proj, "ip_adapter": ip}


def test_instantx_sd3():
    found = recognise("x", instantx_sd3())
    assert (found.tokens, found.width, found.hidden, found.encoder.tokens) == (64, 1152, 2432, 729)
    assert found.label == "InstantX IP-Adapter for SD3.5-large, 64 tokens a picture, encoder SigLIP so400m-384"
    assert len(found.blocks) == 38 and found.feature == "penultimate_hidden_states" and not found.ignored
    for part, key in (("image_proj", "layers.3.2.1.bias"), ("image_proj", "time_embedding.linear_2.weight"),
                      ("ip_adapter", "37.norm_ip_k.weight"), ("ip_adapter", "0.norm_q.weight")):  # fmt: skip
        parts = instantx_sd3()
        del parts[part][key]
        with pytest.raises(StyleLoomError, match=f"{part}.{key} is missing"):
            recognise("x", parts)
    with pytest.raises(StyleLoomError, match="which of them make style is not published"):
        chosen("style", found.architecture)
    assert chosen("custom", found.architecture, "joint 3: 1") == {("joint", 3, 0): (2.0, "style")}


def test_what_is_broken_is_named():
    flat = xlabs()
    flat.pop("double_blocks.18.processor.ip_adapter_double_stream_v_proj.bias")
    with pytest.raises(StyleLoomError, match=r"x: ip_adapter\.18\.to_v_ip\.bias is missing"):
        recognise("x", flat)
    parts = instantx()
    parts["ip_adapter"]["3.to_k_ip.weight"] = empty(3072, 2048)
    with pytest.raises(StyleLoomError, match=r"ip_adapter\.3\.to_k_ip\.weight is \[3072, 2048\] where \[3072, 4096\] is due"):
        recognise("x", parts)
    parts = instantx()
    parts["ip_adapter"] |= {f"{i}.more": empty(1) for i in range(9)}
    with pytest.raises(StyleLoomError, match="9 keys belong to no part of an InstantX IP-Adapter"):
        recognise("x", parts)
    parts = instantx()
    parts["image_proj"]["proj.2.weight"] = empty(5, 2304)
    with pytest.raises(StyleLoomError, match="has 5 rows, no multiple of 4096"):
        recognise("x", parts)


def chosen(preset, architecture=FLUX1_ALL, custom="", two=False):
    return choose(architecture, "x", preset, 2.0, 3.0, two, custom)


def test_presets_are_those_of_splitflux():
    """Counted through from 1: 20 to 29 content, 30 to 57 style, so single blocks 0 to 9 and 10 to 37."""
    assert chosen("style") == {("single", i, 0): (2.0, "style") for i in range(10, 38)}
    assert chosen("layout") == {("single", i, 0): (2.0, "style") for i in range(10)}
    assert chosen("layout", two=True) == {("single", i, 0): (2.0, "layout") for i in range(10)}
    both = chosen("style + layout", two=True)
    assert len(both) == 38 and both["single", 9, 0] == (3.0, "layout") and both["single", 10, 0] == (2.0, "style")
    assert len(chosen("all")) == 57 and set(chosen("all").values()) == {(2.0, "style")}


def test_block_weights():
    made = chosen("custom", custom="double 3: 1, single 12-14: .5\nsingle_blocks.13 = -1")
    assert made == {("double", 3, 0): (2.0, "style"), ("single", 12, 0): (1.0, "style"),
                    ("single", 13, 0): (-2.0, "style"), ("single", 14, 0): (1.0, "style")}  # fmt: skip
    for text in ("double 19: 1", "single 38: 1", "single 4-3: 1", "output 1: 1", "double 1", "double 1: nan", "", "3: 1"):
        with pytest.raises(StyleLoomError, match="double 0 to double 18, single 0 to single 37"):
            chosen("custom", custom=text)
    with pytest.raises(StyleLoomError, match="block_weights has 'single 1: 1'"):
        chosen("custom", FLUX1_DOUBLE, "single 1: 1")


def test_presets_that_reach_nothing():
    for preset in ("style", "layout", "style + layout"):
        with pytest.raises(StyleLoomError, match="reaches none of the blocks .*SplitFlux.*has double 0 to double 18 only"):
            chosen(preset, FLUX1_DOUBLE)
    for preset in ("precise style", "IPAdapter Plus: style", "IPAdapter Plus: ease in"):
        with pytest.raises(StyleLoomError, match="a transformer"):
            chosen(preset)
