"""Names of layers for when no model is given: SDXL's UNet and its two CLIP text encoders, in every trainer's
spelling."""

from __future__ import annotations

import functools

from ..unet.architecture import SDXL

_CLIP_LEAVES = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("k", "q", "v", "out")))


@functools.cache
def clip_key_map() -> dict[str, str]:
    """Names of the layers of the two CLIP text encoders of SDXL (SD1.5 has the first) → weight, as the host calls
    it."""
    found = {}
    for tower, depth, flat, dotted in (
        ("clip_l", 12, ("lora_te_", "lora_te1_"), ("text_encoder.", "")),
        ("clip_g", 32, ("lora_te2_",), ("text_encoder_2.",)),
    ):
        for block in range(depth):
            for leaf in _CLIP_LEAVES:
                name = f"text_model.encoder.layers.{block}.{leaf}"
                target = f"{tower}.transformer.{name}.weight"
                found |= {prefix + name.replace(".", "_"): target for prefix in flat}
                found |= {prefix + name: target for prefix in dotted}
                found[f"text_encoders.{tower}.transformer.{name}"] = target
    return found


@functools.cache
def sdxl_key_map() -> dict[str, str]:
    """Every name that the built-in map knows → the weight's name in the host (`diffusion_model.….weight`)."""
    found = dict(clip_key_map())
    for own, layer in SDXL.weights.items():
        target, other = f"diffusion_model.{own}.weight", layer.diffusers
        for name in (own, other):
            found |= {f"lora_unet_{name.replace('.', '_')}": target, f"lycoris_{name.replace('.', '_')}": target}
        found[f"diffusion_model.{own}"] = found[f"unet.{other}"] = target
    return found


@functools.cache
def sdxl_kernels() -> dict[str, tuple[int, ...]]:
    """Weight, as the host calls it → its kernel, () for linear layers; those of the text encoders too."""
    found = dict.fromkeys(clip_key_map().values(), ())
    return found | {f"diffusion_model.{own}.weight": layer.kernel for own, layer in SDXL.weights.items()}
