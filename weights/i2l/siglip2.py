"""The SigLIP2 vision tower (published: SigLIP2-giant, 384 pixels) with its attention-pooling head.

Architecture: "SigLIP 2: Multilingual Vision-Language Encoders", arXiv 2502.14786; the names of the tensors
are those of `SigLIP2-G384/model.safetensors` in DiffSynth-Studio/General-Image-Encoders.

Why neither ComfyUI's own vision tower nor that of transformers is used:

- ComfyUI (`comfy/clip_vision.py`, read at 0.30.0) knows SigLIP towers of width 1152 only, this one has 1536. Its tower
  has no pooling head (`head.*`), and what that head makes is exactly what the predictors read. It resizes pictures in
  floats, where the published embeddings are of PIL's 8-bit rounding (see `preprocess.py`).
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

WHAT = "SigLIP2"
HEAD_DIM = 96
IMAGE = 384
PATCH = 16
BLOCKS = "encoder.layers."


@dataclass(frozen=True)
class SigLIP2Config:
    """Sizes of a tower; the defaults are the published SigLIP2-giant."""

    hidden: int = 1536
    layers: int = 40
    heads: int = 16
    mlp: int = 6144
    image: int = IMAGE
    patch: int = PATCH
    eps: float = 1e-6

    @property
    def positions(self) -> int:
        return (self.image // self.patch) ** 2


def config_from_shapes(shapes: Mapping[str, Sequence[int]], file: str = "") -> SigLIP2Config:
    """Reads the sizes of a tower from the shapes of its tensors.

    The number of heads cannot be seen in the shapes: the head width of the published tower, 96, is taken.
    `towers.recognise_tower` compares every other tensor with what follows from the result.

    Raises:
        StyleLoomError: a tensor needed for that is missing, or the sizes are not those of such a tower.
    """
    hidden, channels, height, width = shape_of(shapes, "embeddings.patch_embedding.weight", 4, file, WHAT)
    positions, _ = shape_of(shapes, "embeddings.position_embedding.weight", 2, file, WHAT)
    mlp, _ = shape_of(shapes, BLOCKS + "0.mlp.fc1.weight", 2, file, WHAT)
    layers = count_blocks(shapes, BLOCKS)
    side = math.isqrt(positions)
    for name, found, right in (
        ("colour channels", channels, 3),
        ("a patch height", height, PATCH),
        ("a patch width", width, PATCH),
        ("a table of positions", positions, side * side),
        ("a picture side in patches", side, IMAGE // PATCH),
        (f"a width (mod {HEAD_DIM})", hidden % HEAD_DIM, 0),
    ):
        if found != right:
            raise StyleLoomError(
                f"{file or 'The file'} is a SigLIP tower with {name} of {found}.",
                f"{right}, as in SigLIP2-G384, whose picture preparation is used",
                "Choose SigLIP2-G384/model.safetensors.",
            )
    return SigLIP2Config(hidden=hidden, layers=layers, heads=hidden // HEAD_DIM, mlp=mlp)


def key_shapes(config: SigLIP2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file: name → shape."""
    hidden, mlp = config.hidden, config.mlp
    shapes: dict[str, tuple[int, ...]] = {}

    def pair(name: str, *weight: int) -> None:
        shapes[name + ".weight"] = weight
        shapes[name + ".bias"] = weight[:1]

    def feed_forward(name: str) -> None:
        pair(name + ".fc1", mlp, hidden)
        pair(name + ".fc2", hidden, mlp)

    pair("embeddings.patch_embedding", hidden, 3, config.patch, config.patch)
    shapes["embeddings.position_embedding.weight"] = (config.positions, hidden)
    for block in range(config.layers):
        name = f"{BLOCKS}{block}."
        pair(name + "layer_norm1", hidden)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            pair(name + "self_attn." + part, hidden, hidden)
        pair(name + "layer_norm2", hidden)
        feed_forward(name + "mlp")
    pair("post_layernorm", hidden)
    shapes["head.probe"] = (1, 1, hidden)
    shapes["head.attention.in_proj_weight"] = (3 * hidden, hidden)
    shapes["head.attention.in_proj_bias"] = (3 * hidden,)
    pair("head.attention.out_proj", hidden, hidden)
    pair("head.layernorm", hidden)
    feed_forward("head.mlp")
    return shapes


class _Table(nn.Module):
    """A bare weight under a name of its own (the positions are added whole, never looked up)."""

    def __init__(self, *shape: int, dtype=None, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))


class _Embeddings(nn.Module):
    def __init__(self, config: SigLIP2Config, operations, **place):
        super().__init__()
        self.patch_embedding = operations.Conv2d(3, config.hidden, config.patch, stride=config.patch, **place)
        self.position_embedding = _Table(config.positions, config.hidden, **place)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # row by row, from the top left
        # Sums keep the layout of their terms: left transposed, every norm of every block would copy the tokens.
        return tokens.contiguous() + like(self.position_embedding.weight, tokens)


class _SelfAttention(nn.Module):
    def __init__(self, config: SigLIP2Config, operations, **place):
        super().__init__()
        self.heads = config.heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, operations.Linear(config.hidden, config.hidden, **place))

    def forward(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        q, k, v = (split_heads(project(layer, x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return project(self.out_proj, join_heads(attention(q, k, v)))


class _FeedForward(nn.Module):
    def __init__(self, config: SigLIP2Config, operations, **place):
        super().__init__()
        self.fc1 = operations.Linear(config.hidden, config.mlp, **place)
        self.fc2 = operations.Linear(config.mlp, config.hidden, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(self.fc2, F.gelu(project(self.fc1, x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, config: SigLIP2Config, operations, **place):
        super().__init__()
        self.layer_norm1 = operations.LayerNorm(config.hidden, eps=config.eps, **place)
        self.self_attn = _SelfAttention(config, operations, **place)
        self.layer_norm2 = operations.LayerNorm(config.hidden, eps=config.eps, **place)
        self.mlp = _FeedForward(config, operations, **place)

    def forward(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), attention)
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, config: SigLIP2Config, operations, **place):
        super().__init__()
        self.layers = nn.ModuleList(_Block(config, operations, **place) for _ in range(config.layers))


class _PackedAttention(nn.Module):
    """Attention of one query token over all tokens, its three input projections stored as one matrix."""

    def __init__(self, config: SigLIP2Config, operations, **place):
        super().__init__()
        self.heads = config.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.hidden, config.hidden, **place))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.hidden, **place))
        self.out_proj = operations.Linear(config.hidden, config.hidden, **place)

    def forward(self, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        hidden = x.shape[-1]
        weight, bias = like(self.in_proj_weight, x), like(self.in_proj_bias, x)
        q = F.linear(query, weight[:hidden], bias[:hidden])
        k, v = F.linear(x, weight[hidden:], bias[hidden:]).chunk(2, dim=-1)
        q, k, v = (split_heads(tensor, self.heads) for tensor in (q, k, v))
        # The published encoder scales the query first and rounds the weights between the two products;
        # written out like that it is the same to the bit in bf16 too, and for one query it costs nothing.
        weights = torch.softmax((q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1), dim=-1)
        return self.out_proj(join_heads(weights @ v))


class _PoolingHead(nn.Module):
    def __init__(self, config: SigLIP2Config, operations, **place):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden, **place))
        self.attention = _PackedAttention(config, operations, **place)
        self.layernorm = operations.LayerNorm(config.hidden, eps=config.eps, **place)
        self.mlp = _FeedForward(config, operations, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probe = like(self.probe, x).expand(x.shape[0], -1, -1)
        pooled = self.attention(probe, x)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SigLIP2Vision(nn.Module):
    """The tower, its state dict named as in the published file.

    Args:
        config: sizes.
        operations: namespace with Linear, LayerNorm and Conv2d (`torch.nn`, or the host's casting ones).
        attention: (B, heads, T, D) × 3 → (B, heads, T, D), for the blocks; torch's own by default.
        dtype, device: of the parameters.
    """

    def __init__(
        self, config: SigLIP2Config, operations=nn, attention: Attention = plain_attention, dtype=None, device=None
    ):
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.config = config
        self.attention = attention
        self.embeddings = _Embeddings(config, operations, **place)
        self.encoder = _Encoder(config, operations, **place)
        self.post_layernorm = operations.LayerNorm(config.hidden, eps=config.eps, **place)
        self.head = _PoolingHead(config, operations, **place)

    def forward(self, pixel_values: torch.Tensor, on_block: OnBlock | None = None) -> torch.Tensor:
        """Prepared pictures (B, 3, 384, 384) → pooled embedding (B, hidden), in the pixels' dtype.

        The dtype of `pixel_values` is the dtype of the computation. `on_block(done, total)` is called after
        each block; what it raises ends the computation.
        """
        side = self.config.image
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise StyleLoomError(
                f"SigLIP2 was given pixels of shape {tuple(pixel_values.shape)}.",
                f"(images, 3, {side}, {side})",
                "Prepare the picture with preprocess.siglip_pixels.",
            )
        x = self.embeddings(pixel_values)
        total = len(self.encoder.layers)
        for done, block in enumerate(self.encoder.layers, 1):
            x = block(x, self.attention)
            if on_block is not None:
                on_block(done, total)
        return self.head(self.post_layernorm(x))
