"""Writes ordinary LoRA files: the Qwen-Image bias LoRA in the publisher's naming, a kohya LoRA for SDXL, and a content
and a style LoRA for the small SDXL that conflict in some directions and not in others."""

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


def sdxl_layers(width: int = 32, context: int = 80) -> dict[str, tuple[str, int, int]]:
    """The 700 attention and feed-forward layers of SDXL at a base width: name in the checkpoint → (diffusers' name,
    in_features, out_features)."""
    layers = {}

    def block(own: str, other: str, depth: int, side: int) -> None:
        for i in range(depth):
            sizes = {"ff.net.0.proj": (side, 8 * side), "ff.net.2": (4 * side, side)}
            for a in (1, 2):
                sizes |= {f"attn{a}.to_{p}": (side, side) for p in ("q", "out.0")}
                sizes |= {f"attn{a}.to_{p}": (side if a == 1 else context, side) for p in ("k", "v")}
            for name, (a_dim, b_dim) in sizes.items():
                path = f"transformer_blocks.{i}.{name}"
                layers[f"{own}.{path}"] = (f"{other}.{path}", a_dim, b_dim)

    for n, (depth, side) in {4: (2, 2), 5: (2, 2), 7: (10, 4), 8: (10, 4)}.items():
        block(f"input_blocks.{n}.1", f"down_blocks.{1 + (n > 5)}.attentions.{(n - 4) % 3}", depth, side * width)
    block("middle_block.1", "mid_block.attentions.0", 10, 4 * width)
    for n in range(6):
        depth, side = (10, 4) if n < 3 else (2, 2)
        block(f"output_blocks.{n}.1", f"up_blocks.{n // 3}.attentions.{n % 3}", depth, side * width)
    return layers


def write_sdxl_lora(path: str | os.PathLike, role: str, seed: int = 0, rank: int = 8, alpha: float = 8.0, shared: int = 3,
                    cosine: float = 0.85, relative: float = 0.25, width: int = 32, context: int = 80,
                    dtype: torch.dtype = torch.float16, recipe: str = "") -> Path:
    """Writes a content or a style LoRA in kohya's format for all 700 layers.

    Args:
        role: "content" is written in the checkpoint's block numbers, "style" in diffusers' names. The style LoRA reads
            `shared` of its inputs at this cosine to those of the content LoRA of the same seed, and the rest elsewhere.
    """
    tensors = {}
    scale = alpha / rank
    for own, (other, a_dim, b_dim) in sdxl_layers(width, context).items():
        first, up = _pair(seed, f"content.{own}", a_dim, b_dim, rank, relative / scale, dtype)
        down, name = first, own
        if role == "style":
            down, up = _pair(seed, f"style.{own}", a_dim, b_dim, rank, relative / scale, dtype)
            mixed = cosine * first[:shared].float() + math.sqrt(1 - cosine**2) * down[:shared].float()
            down, name = torch.cat((mixed.to(dtype), down[shared:])), other
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return save_whole(path, tensors, recipe)
