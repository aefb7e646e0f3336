"""Writes small SigLIP2 and DINOv3 towers with the published key names (sizes: see `key_lists`).

Filters and scales make an untrained tower tell pictures apart: coarse contrasts seen strongly and plain brightness
weakly, weak positions, sharp pooling attention.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from .key_lists import Shape, dinov3_keys, siglip2_keys
from .seeded import normal, save_whole

SIGLIP_HEAD_DIM = 96
DINO_HEAD_DIM = 128


def _patch_filters(key: str, shape: Shape, seed: int) -> torch.Tensor:
    """Random 4 × 4 contrasts over the 16 × 16 pixels of a patch, with a tenth of their mean left."""
    coarse = normal(seed, key, (*shape[:2], 4, 4), 0.15)
    coarse -= 0.9 * coarse.mean((2, 3), keepdim=True)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


def _tensor(key: str, shape: Shape, seed: int, dtype: torch.dtype) -> torch.Tensor:
    leaf = key.rsplit(".", 1)[-1]
    mean = std = 0.0
    if "position_embedding" in key:
        std = 0.1
    elif "patch_embedding" in key and leaf == "weight":
        return _patch_filters(key, shape, seed).to(dtype)
    elif leaf == "cls_token":
        std = 0.3  # small, so that what it gathers from the patches outweighs it
    elif leaf in ("mask_token", "register_tokens", "probe"):
        std = 1.0
    elif leaf == "lambda1":
        mean, std = 1.0, 0.05
    elif "norm" in key and leaf == "weight":
        mean, std = 1.0, 0.05
    elif leaf == "in_proj_bias" or leaf == "bias":
        std = 0.02
    elif any(part in key for part in ("q_proj", "k_proj", "in_proj_weight")):
        std = 1.6 / math.sqrt(shape[-1])
    else:
        std = 1.0 / math.sqrt(shape[-1])
    return normal(seed, key, shape, std, mean, dtype)


def _write(path, keys: dict[str, Shape], seed: int, dtype: torch.dtype, recipe: str) -> Path:
    return save_whole(path, {k: _tensor(k, shape, seed, dtype) for k, shape in keys.items()}, recipe)


def write_siglip2(path: str | os.PathLike, hidden: int = 96, layers: int = 2, mlp: int | None = None, seed: int = 0,
                  dtype: torch.dtype = torch.bfloat16, recipe: str = "") -> Path:
    """Writes a SigLIP2 tower; `hidden` must be a multiple of its head's 96."""
    if hidden % SIGLIP_HEAD_DIM:
        raise ValueError(f"hidden {hidden}: expected a multiple of {SIGLIP_HEAD_DIM}")
    return _write(path, siglip2_keys(hidden, layers, mlp), seed, dtype, recipe)


def write_dinov3(path: str | os.PathLike, hidden: int = 128, layers: int = 2, mlp: int | None = None, seed: int = 0,
                 dtype: torch.dtype = torch.bfloat16, recipe: str = "") -> Path:
    """Writes a DINOv3 tower; `hidden` must be a multiple of its head's 128."""
    if hidden % DINO_HEAD_DIM:
        raise ValueError(f"hidden {hidden}: expected a multiple of {DINO_HEAD_DIM}")
    return _write(path, dinov3_keys(hidden, layers, mlp), seed, dtype, recipe)
