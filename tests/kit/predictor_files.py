"""Writes i2L predictor files with the exact key scheme at any width.

Weights are scaled so that embeddings of unit size (each entry about N(0, 1)) give a LoRA whose ΔW = B·A is some
tenth of the size of a freshly scaled weight (entries of variance 1 / fan-in), as a trained LoRA is.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from .key_lists import predictor_keys
from .seeded import normal, save_whole

RELATIVE_DELTA = 0.15  # ‖ΔW‖ / ‖W‖ for a unit embedding without residual, in the mean
RESIDUAL_SCALE = 0.05  # the published forward multiplies the residual by this
RESIDUAL_SHARE = 0.5  # size of the residual's part in the hidden vector, relative to the embedding's part


def _std(key: str, shape: tuple[int, ...], rank: int) -> float:
    fan_in = shape[1]
    if ".proj_residual.proj_in." in key:
        return 1.0 / math.sqrt(fan_in)
    if ".proj_residual.proj_out." in key:
        return RESIDUAL_SHARE / RESIDUAL_SCALE / math.sqrt(fan_in)
    if key.endswith("proj_in.weight"):
        return 1.0 / math.sqrt(fan_in)
    # With A's entries 1/√a_dim and B's `RELATIVE_DELTA`/√rank, ΔW's entries have size RELATIVE_DELTA/√a_dim.
    size = 1.0 / math.sqrt(shape[0] // rank) if ".proj_a." in key else RELATIVE_DELTA / math.sqrt(rank)
    return size / math.sqrt(fan_in)


def write_predictor(path: str | os.PathLike, family: str, width: int | None = None, mlp_width: int | None = None, *,
                    compress: int, rank: int = 4, in_dim: int = 1536 + 4096, residual: str | None = None,
                    residual_width: int = 3584, residual_mid: int | None = None, seed: int = 0,
                    dtype: torch.dtype = torch.bfloat16, recipe: str = "") -> Path:
    """Writes one predictor file.

    Args:
        family: "z-image" (238 targets) or "qwen-image" (720 targets).
        width, mlp_width: of the diffusion model; the published ones by default.
        compress: rows of every `proj_in`. rank: of one image's LoRA. in_dim: size of an image's embedding.
        residual: None, "coarse" (71 tokens) or "fine" (1376 tokens).
        residual_width: of one residual token (3584 as published); residual_mid: rows of `proj_residual.proj_in`.
        seed, dtype: two files of one seed have the same bytes.
    """
    keys = predictor_keys(family, width, mlp_width, compress=compress, rank=rank, in_dim=in_dim, residual=residual,
                          residual_width=residual_width, residual_mid=residual_mid)
    tensors = {k: normal(seed, k, shape, _std(k, shape, rank), dtype=dtype) for k, shape in keys.items()}
    return save_whole(path, tensors, recipe)
