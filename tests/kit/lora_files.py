"""Writes ordinary LoRA files: the Qwen-Image bias LoRA in the publisher's naming, and a kohya LoRA for SDXL."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from .key_lists import leaves
from .seeded import normal, save_whole


def _pair(seed: int, stem: str, a_dim: int, b_dim: int, rank: int, relative: float, dtype: torch.dtype):
    """A (rank, a_dim) and B (b_dim, rank) with ‖B·A‖ about `relative` of a weight with entries 1/√a_dim."""
    a = normal(seed, f"{stem}.a", (rank, a_dim), 1.0 / math.sqrt(a_dim), dtype=dtype)
    b = normal(seed, f"{stem}.b", (b_dim, rank), relative / math.sqrt(rank), dtype=dtype)
    return a, b


def write_bias_lora(path: str | os.PathLike, width: int = 3072, mlp_width: int = 12288, rank: int = 4, seed: int = 0,
                    dtype: torch.dtype = torch.bfloat16, relative: float = 0.05, recipe: str = "") -> Path:
    """Writes all 720 pairs as `transformer_blocks.N.….lora_A.default.weight`, no prefix and no alpha."""
    tensors = {}
    for leaf in leaves("qwen-image", width, mlp_width):
        a, b = _pair(seed, leaf.target, leaf.a_dim, leaf.b_dim, rank, relative, dtype)
        tensors[f"{leaf.target}.lora_A.default.weight"] = a
        tensors[f"{leaf.target}.lora_B.default.weight"] = b
    return save_whole(path, tensors, recipe)


def write_kohya_lora(path: str | os.PathLike, layers: dict[str, tuple[int, int]], rank: int = 4,
                     alpha: float | None = None, seed: int = 0, dtype: torch.dtype = torch.float16,
                     relative: float = 0.15, recipe: str = "") -> Path:
    """Writes `<name>.lora_down.weight`, `.lora_up.weight` and `.alpha` for every layer.

    Args:
        layers: kohya name (e.g. "lora_unet_…_attn2_to_v") → (in_features, out_features).
        alpha: the file's alpha; the rank when None, so that the loader scales by 1.
    """
    tensors = {}
    scale = (rank if alpha is None else alpha) / rank
    for name, (a_dim, b_dim) in layers.items():
        down, up = _pair(seed, name, a_dim, b_dim, rank, relative / scale, dtype)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(scale * rank, dtype=dtype)
    return save_whole(path, tensors, recipe)
