"""The DINOv3 vision tower with gated feed-forward (published: DINOv3-7B, patch 16).

Architecture: "DINOv3", arXiv 2508.10104; the names of the tensors are those of `DINOv3-7B/model.safetensors`
in DiffSynth-Studio/General-Image-Encoders.

Why neither ComfyUI's own vision tower nor that of transformers is used:

- ComfyUI (`comfy/image_encoders/dino3.py`, read at 0.30.0) has the DINOv3 of 32 blocks of width 1280 alone; this one
  has 40 of width 4096. Its queries and values have biases, which are not in this one's file. Its rotation uses fp32
  frequencies in every precision, where the published embeddings are of bf16 ones (see `rotation`).
- transformers is no dependency of `weights/`. Its classes name the tensors in another way from version to version, read
  a model folder with a config where artists have one file, and cannot store matrices as fp8 or leave the casting of
  weights to the host. The tests compare this tower with theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import StyleLoomError
from .tower_parts import (
    Attention,
    OnBlock,
    count_blocks,
    join_heads,
    like,
    plain_attention,
    project,
    shape_of,
    split_heads,
)

WHAT = "DINOv3"
HEAD_DIM = 128
IMAGE = 224
PATCH = 16
BLOCKS = "layer."


@dataclass(frozen=True)
class DINOv3Config:
    """Sizes of a tower; the defaults are the published DINOv3-7B."""

    hidden: int = 4096
    layers: int = 40
    heads: int = 32
    mlp: int = 8192
    registers: int = 4
    image: int = IMAGE
    patch: int = PATCH
    eps: float = 1e-5
    rope_theta: float = 100.0


def config_from_shapes(shapes: Mapping[str, Sequence[int]], file: str = "") -> DINOv3Config:
    """Reads the sizes of a tower from the shapes of its tensors.

    The number of heads cannot be seen in the shapes: the head width of the published tower, 128, is taken.
    `towers.recognise_tower` compares every other tensor with what follows from the result.

    Raises:
        StyleLoomError: a tensor needed for that is missing, or the sizes are not those of such a tower.
    """
    hidden, channels, height, width = shape_of(shapes, "embeddings.patch_embeddings.weight", 4, file, WHAT)
    _, registers, _ = shape_of(shapes, "embeddings.register_tokens", 3, file, WHAT)
    mlp, _ = shape_of(shapes, BLOCKS + "0.mlp.gate_proj.weight", 2, file, WHAT + "-7B (gated)")
    layers = count_blocks(shapes, BLOCKS)
    for name, found, right in (
        ("colour channels", channels, 3),
        ("a patch height", height, PATCH),
        ("a patch width", width, PATCH),
        (f"a width (mod {HEAD_DIM})", hidden % HEAD_DIM, 0),
    ):
        if found != right:
            raise StyleLoomError(
                f"{file or 'The file'} is a DINOv3 tower with {name} of {found}.",
                f"{right}, as in DINOv3-7B, whose picture preparation is used",
                "Choose DINOv3-7B/model.safetensors.",
            )
    return DINOv3Config(hidden=hidden, layers=layers, heads=hidden // HEAD_DIM, mlp=mlp, registers=registers)


def key_shapes(config: DINOv3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file: name → shape. `mask_token` is in the file, and used in pre-training only."""
    hidden, mlp = config.hidden, config.mlp
    shapes: dict[str, tuple[int, ...]] = {}

    def pair(name: str, *weight: int) -> None:
        shapes[name + ".weight"] = weight
        shapes[name + ".bias"] = weight[:1]

    shapes["embeddings.cls_token"] = (1, 1, hidden)
    shapes["embeddings.mask_token"] = (1, 1, hidden)
    shapes["embeddings.register_tokens"] = (1, config.registers, hidden)
    pair("embeddings.patch_embeddings", hidden, 3, config.patch, config.patch)
    for block in range(config.layers):
        name = f"{BLOCKS}{block}."
        pair(name + "norm1", hidden)
        for part in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{name}attention.{part}.weight"] = (hidden, hidden)
        pair(name + "attention.o_proj", hidden, hidden)
        shapes[name + "layer_scale1.lambda1"] = (hidden,)
        pair(name + "norm2", hidden)
        pair(name + "mlp.gate_proj", mlp, hidden)
        pair(name + "mlp.up_proj", mlp, hidden)
        pair(name + "mlp.down_proj", hidden, mlp)
        shapes[name + "layer_scale2.lambda1"] = (hidden,)
    pair("norm", hidden)
    return shapes


def rotation(config: DINOv3Config, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines that turn queries and keys by their patch's place, (patches, head_dim) each.

    A patch's place is its centre, rows and columns from -1 to 1; the frequencies are theta^(-4j/head_dim).
    Half of the first head_dim/2 angles are of the row, half of the column; the second half repeats them.
    """
    side = config.image // config.patch
    head_dim = config.hidden // config.heads
    frequencies = 1 / config.rope_theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    # The published encoder is loaded and then cast as a whole to bf16, and the frequencies are a buffer of
    # it: they are rounded to the dtype of the computation before the angles are computed in fp32. Predictors
    # were trained on embeddings made that way (13 % of the bf16 cosines and sines differ without it). In an
    # fp32 computation nothing is rounded.
    frequencies = frequencies.to(dtype).to(torch.float32)
    places = 2.0 * (torch.arange(0.5, side, dtype=torch.float32, device=device) / side) - 1.0
    places = torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1).flatten(0, 1)
    angles = 2 * math.pi * places[:, :, None] * frequencies
    angles = angles.flatten(1).tile(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the last cos.shape[0] tokens of x (B, heads, T, D); the first ones have no place in the picture."""
    patches = cos.shape[0]
    prefix, body = x[..., :-patches, :], x[..., -patches:, :]
    first, second = body.chunk(2, dim=-1)
    body = body * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((prefix, body), dim=-2)


class _Embeddings(nn.Module):
    def __init__(self, config: DINOv3Config, operations, **place):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden, **place))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden, **place))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, config.hidden, **place))
        self.patch_embeddings = operations.Conv2d(3, config.hidden, config.patch, stride=config.patch, **place)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)  # row by row, from the top left
        prefix = [like(token, patches) for token in (self.cls_token, self.register_tokens)]
        return torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in prefix), patches], dim=1)


class _SelfAttention(nn.Module):
    def __init__(self, config: DINOv3Config, operations, **place):
        super().__init__()
        self.heads = config.heads
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, operations.Linear(config.hidden, config.hidden, bias=False, **place))
        self.o_proj = operations.Linear(config.hidden, config.hidden, **place)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        q, k, v = (split_heads(project(layer, x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return project(self.o_proj, join_heads(attention(rotate(q, cos, sin), rotate(k, cos, sin), v)))


class _LayerScale(nn.Module):
    def __init__(self, config: DINOv3Config, **place):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(config.hidden, **place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * like(self.lambda1, x)


class _GatedFeedForward(nn.Module):
    def __init__(self, config: DINOv3Config, operations, **place):
        super().__init__()
        self.gate_proj = operations.Linear(config.hidden, config.mlp, **place)
        self.up_proj = operations.Linear(config.hidden, config.mlp, **place)
        self.down_proj = operations.Linear(config.mlp, config.hidden, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(self.down_proj, F.silu(project(self.gate_proj, x)) * project(self.up_proj, x))


class _Block(nn.Module):
    def __init__(self, config: DINOv3Config, operations, **place):
        super().__init__()
        self.norm1 = operations.LayerNorm(config.hidden, eps=config.eps, **place)
        self.attention = _SelfAttention(config, operations, **place)
        self.layer_scale1 = _LayerScale(config, **place)
        self.norm2 = operations.LayerNorm(config.hidden, eps=config.eps, **place)
        self.mlp = _GatedFeedForward(config, operations, **place)
        self.layer_scale2 = _LayerScale(config, **place)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x), cos, sin, attention))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class DINOv3Vision(nn.Module):
    """The tower, its state dict named as in the published file.

    Args:
        config: sizes.
        operations: namespace with Linear, LayerNorm and Conv2d (`torch.nn`, or the host's casting ones).
        attention: (B, heads, T, D) × 3 → (B, heads, T, D); torch's own by default.
        dtype, device: of the parameters.
    """

    def __init__(
        self, config: DINOv3Config, operations=nn, attention: Attention = plain_attention, dtype=None, device=None
    ):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.config = config
        self.attention = attention
        self.embeddings = _Embeddings(config, operations, **place)
        self.layer = nn.ModuleList(_Block(config, operations, **place) for _ in range(config.layers))
        self.norm = operations.LayerNorm(config.hidden, eps=config.eps, **place)

    def forward(self, pixel_values: torch.Tensor, on_block: OnBlock | None = None) -> torch.Tensor:
        """Prepared pictures (B, 3, 224, 224) → embedding of the class token (B, hidden), in the pixels' dtype.

        The dtype of `pixel_values` is the dtype of the computation. `on_block(done, total)` is called after
        each block; what it raises ends the computation.
        """
        side = self.config.image
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise StyleLoomError(
                f"DINOv3 was given pixels of shape {tuple(pixel_values.shape)}.",
                f"(images, 3, {side}, {side})",
                "Prepare the picture with preprocess.dino_pixels.",
            )
        x = self.embeddings(pixel_values)
        cos, sin = rotation(self.config, x.dtype, x.device)
        total = len(self.layer)
        for done, block in enumerate(self.layer, 1):
            x = block(x, cos, sin, self.attention)
            if on_block is not None:
                on_block(done, total)
        # Only the class token is used, and the norm is of each token by itself.
        return self.norm(x[:, 0])
