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
