"""Tensors of the IP-Adapters for transformers with the published key names, at any width."""

from __future__ import annotations

import math

import torch

from .seeded import normal

Shapes = dict[str, tuple[int, ...]]


def _filled(seed: int, shapes: Shapes, loud: float) -> dict[str, torch.Tensor]:
    made = {}
    for key, shape in shapes.items():
        norm = len(shape) == 1 and "norm" in key and key.endswith("weight") and "linear" not in key
        std = 0.05 if len(shape) == 1 else (loud if "_ip." in key or "_proj." in key else 1.0) / math.sqrt(shape[-1])
        made[key] = normal(seed, key, shape, std, 1.0 if norm else 0.0)
    return made


def xlabs(width: int = 48, hidden: int = 32, cross: int = 20, tokens: int = 4, seed: int = 0, loud: float = 1.0):
    """XLabs's FLUX.1 adapter, flat, with its own names."""
    shapes: Shapes = {"ip_adapter_proj_model.proj.weight": (tokens * cross, width),
                      "ip_adapter_proj_model.proj.bias": (tokens * cross,),
                      "ip_adapter_proj_model.norm.weight": (cross,), "ip_adapter_proj_model.norm.bias": (cross,)}
    for i in range(19):
        for part in "kv":
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{part}_proj"
            shapes |= {f"{name}.weight": (hidden, cross), f"{name}.bias": (hidden,)}
    return _filled(seed, shapes, loud)


def instantx(width: int = 48, hidden: int = 32, cross: int = 20, tokens: int = 6, seed: int = 0, loud: float = 1.0):
    """InstantX's FLUX.1 adapter, flat."""
    rows = tokens * cross
    shapes: Shapes = {"image_proj.proj.0.weight": (2 * width, width), "image_proj.proj.0.bias": (2 * width,),
                      "image_proj.proj.2.weight": (rows, 2 * width), "image_proj.proj.2.bias": (rows,),
                      "image_proj.norm.weight": (cross,), "image_proj.norm.bias": (cross,)}
    shapes |= {f"ip_adapter.{i}.to_{part}_ip.weight": (hidden, cross) for i in range(57) for part in "kv"}
    return _filled(seed, shapes, loud)


def instantx_sd3(width: int = 144, hidden: int = 128, cross: int = 40, tokens: int = 6, dim: int = 128, wave: int = 32,
                 depth: int = 2, seed: int = 0, loud: float = 1.0):
    """InstantX's SD3.5-large adapter, flat. wave: of the time step's sinusoid."""
    shapes: Shapes = {"latents": (1, tokens, dim), "norm_out.weight": (cross,), "norm_out.bias": (cross,)}

    def linear(key: str, rows: int, columns: int) -> Shapes:
        return {f"{key}.weight": (rows, columns), f"{key}.bias": (rows,)}

    shapes |= linear("proj_in", dim, width) | linear("proj_out", cross, dim)
    shapes |= linear("time_embedding.linear_1", dim, wave) | linear("time_embedding.linear_2", dim, dim)
    for i in range(depth):
        at = f"layers.{i}"
        shapes |= {f"{at}.{norm}.{end}": (dim,) for norm in ("0.norm1", "0.norm2", "1.0") for end in ("weight", "bias")}
        shapes |= {f"{at}.0.to_q.weight": (dim, dim), f"{at}.0.to_kv.weight": (2 * dim, dim),
                   f"{at}.0.to_out.weight": (dim, dim), f"{at}.1.1.weight": (4 * dim, dim),
                   f"{at}.1.3.weight": (dim, 4 * dim)} | linear(f"{at}.2.1", 4 * dim, dim)
    shapes = {f"image_proj.{key}": shape for key, shape in shapes.items()}
    for n in range(38):
        shapes |= {f"ip_adapter.{n}.to_{part}_ip.weight": (hidden, cross) for part in "kv"}
        shapes |= {f"ip_adapter.{n}.{norm}.weight": (64,) for norm in ("norm_q", "norm_k", "norm_ip_k")}
        shapes |= linear(f"ip_adapter.{n}.norm_ip.linear", 2 * cross, dim)
    made = _filled(seed, shapes, loud)
    # The feed-forward part's norm has no name that says so.
    return {key: value + 1.0 if key.endswith(".1.0.weight") else value for key, value in made.items()}
