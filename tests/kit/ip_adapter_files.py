"""Writes IP-Adapter files with the published key names, at any width: base, plus (resampler) and full-face.

The layers' numbers are those of the published files: cross-attentions in the order down, up, middle, with the
self-attentions counted in between, so 1, 3, 5, …
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from .seeded import normal, save_whole

# Widths in units of the base channels, in file order (down, up, middle), of all 70 and all 16 layers.
SDXL_LEVELS = [2] * 4 + [4] * 20 + [4] * 30 + [2] * 6 + [4] * 10
SD15_LEVELS = [1] * 2 + [2] * 2 + [4] * 2 + [4] * 3 + [2] * 3 + [1] * 3 + [4]


def _filled(seed: int, shapes: dict[str, tuple[int, ...]], loud: float) -> dict[str, torch.Tensor]:
    tensors = {}
    for key, shape in shapes.items():
        if key.endswith(("norm.weight", "norm_out.weight", "norm1.weight", "norm2.weight", "1.0.weight", "3.weight")) \
                and len(shape) == 1:
            std, mean = 0.05, 1.0
        elif len(shape) == 1:
            std, mean = 0.05, 0.0
        elif key.endswith("latents"):
            std, mean = 1.0 / math.sqrt(shape[-1]), 0.0
        else:
            std, mean = (loud if "_ip." in key else 1.0) / math.sqrt(shape[-1]), 0.0
        tensors[key] = normal(seed, key, shape, std, mean)
    return tensors


def projection_shapes(kind: str, width: int, cross: int, tokens: int = 4, dim: int = 128,
                      depth: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `image_proj`. kind: "base", "plus" or "full"; dim and depth are the resampler's."""
    if kind == "base":
        return {"proj.weight": (tokens * cross, width), "proj.bias": (tokens * cross,), "norm.weight": (cross,),
                "norm.bias": (cross,)}
    if kind == "full":
        return {"proj.0.weight": (width, width), "proj.0.bias": (width,), "proj.2.weight": (cross, width),
                "proj.2.bias": (cross,), "proj.3.weight": (cross,), "proj.3.bias": (cross,)}
    shapes = {"latents": (1, tokens, dim), "proj_in.weight": (dim, width), "proj_in.bias": (dim,),
              "proj_out.weight": (cross, dim), "proj_out.bias": (cross,), "norm_out.weight": (cross,),
              "norm_out.bias": (cross,)}
    for i in range(depth):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.weight": (dim,), f"layers.{i}.{norm}.bias": (dim,)}
        shapes |= {f"layers.{i}.0.to_q.weight": (dim, dim), f"layers.{i}.0.to_kv.weight": (2 * dim, dim),
                   f"layers.{i}.0.to_out.weight": (dim, dim), f"layers.{i}.1.1.weight": (4 * dim, dim),
                   f"layers.{i}.1.3.weight": (dim, 4 * dim)}
    return shapes


def layer_shapes(levels: list[int], channels: int, cross: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `ip_adapter`."""
    return {f"{2 * i + 1}.to_{part}_ip.weight": (level * channels, cross)
            for i, level in enumerate(levels) for part in "kv"}


def ip_adapter_tensors(kind: str = "base", model: str = "sdxl", channels: int = 32, width: int = 48, cross: int = 80,
                       seed: int = 0, loud: float = 1.0, **options) -> dict[str, dict[str, torch.Tensor]]:
    """The two dicts of a `.bin`, fp32. loud: size of what the layers make of a token of size one."""
    levels = {"sdxl": SDXL_LEVELS, "sd1.5": SD15_LEVELS}[model]
    return {"image_proj": _filled(seed, projection_shapes(kind, width, cross, **options), loud),
            "ip_adapter": _filled(seed, layer_shapes(levels, channels, cross), loud)}


def write_ip_adapter(path: str | os.PathLike, dtype: torch.dtype = torch.float16, recipe: str = "", **options) -> Path:
    """Writes one `.safetensors`; `options` as `ip_adapter_tensors`."""
    parts = ip_adapter_tensors(**options)
    return save_whole(path, {f"{part}.{key}": value.to(dtype) for part, tensors in parts.items()
                             for key, value in tensors.items()}, recipe)
