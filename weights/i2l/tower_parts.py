"""What the two image encoders have in common: attention, casting, and the check of a file's keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from ..errors import StyleLoomError

# Attention takes q, k and v of shape (batch, heads, tokens, head_dim) and gives the same shape.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Called after each block with (blocks done, blocks in all); what it raises stops the encoder.
OnBlock = Callable[[int, int], None]

# How quantised files name what goes with a weight. Reading such a weight without its scale gives noise.
_SCALINGS = re.compile(r"(scale_weight|scale_input|weight_scale(_2)?|input_scale|comfy_quant|scaled_fp8)$")
_SHOWN = 3


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax(q·kᵀ/√head_dim)·v without a mask; shapes (batch, heads, tokens, head_dim), any float dtype."""
    return F.scaled_dot_product_attention(q, k, v)


def split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, heads·D) → (B, heads, T, D), a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(tokens: torch.Tensor) -> torch.Tensor:
    """(B, heads, T, D) → (B, T, heads·D)."""
    return tokens.transpose(1, 2).flatten(2)


def like(parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The parameter in the dtype and on the device of `x`.

    Layers of `operations` cast their own weights; a bare parameter may have been left in the file's
    dtype, or on the CPU by the host's offloading, so it is cast where it is used.
    """
    return parameter.to(device=x.device, dtype=x.dtype)


def project(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, undoing the power of two that a weight stored as fp8 was multiplied by.

    The factor goes onto the input: that is exact in binary floating point, and leaves the layer, its
    bias and the host's casting as they are.
    """
    scale = getattr(layer, "storage_scale", 1.0)
    return layer(x if scale == 1.0 else x * scale)


def shape_of(shapes: Mapping[str, Sequence[int]], key: str, rank: int, file: str, what: str) -> tuple[int, ...]:
    """The shape of one tensor that the sizes of a tower are read from.

    Raises:
        StyleLoomError: the key is missing or has another number of dimensions.
    """
    found = shapes.get(key)
    if found is None or len(found) != rank:
        state = "has no tensor" if found is None else f"has a {len(found)}-dimensional tensor"
        raise StyleLoomError(
            f"{file or 'The file'} {state} {key}.",
            f"a {what} file, where {key} has {rank} dimensions",
            "Choose the published file; if this is that file, download it again.",
        )
    return tuple(int(size) for size in found)


def count_blocks(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """How many blocks a file has: the highest N of keys `{prefix}N.…`, plus one (0 if there are none)."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = [int(match.group(1)) for match in map(pattern.match, shapes) if match]
    return max(numbers, default=-1) + 1


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_shapes(
    shapes: Mapping[str, Sequence[int]], expected: Mapping[str, tuple[int, ...]], file: str, what: str
) -> None:
    """Compares a file's keys and shapes with the published list: none missing, none left over, all of one size.

    Raises:
        StyleLoomError: naming the first few missing, unexpected and misshapen keys, with their counts.
    """
    missing = [key for key in expected if key not in shapes]
    unexpected = [key for key in shapes if key not in expected]
    wrong = [
        f"{key} {tuple(shapes[key])} instead of {shape}"
        for key, shape in expected.items()
        if key in shapes and tuple(shapes[key]) != tuple(shape)
    ]
    if not (missing or unexpected or wrong):
        return
    scalings = [key for key in unexpected if _SCALINGS.search(key)]
    if scalings:
        raise StyleLoomError(
            f"{file or 'The file'} is a quantised {what} file: it has {len(scalings)} tensors of scales: "
            f"{_some(scalings)}.",
            f"a {what} file with plain weights (bf16, fp16, fp32, or fp8 without scales)",
            'Choose the published bf16 file; precision "fp8" makes it small while it is loaded.',
        )
    problems = [
        f"{len(names)} {kind}: {_some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
        if names
    ]
    raise StyleLoomError(
        f"{file or 'The file'} looks like a {what} file, but its tensors do not fit together: {'; '.join(problems)}.",
        f"{len(expected)} tensors as published",
        "Download the file again; if it was converted, use the published one.",
    )
