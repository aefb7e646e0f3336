"""FLUX.1 Redux restricted to blocks: which blocks see its tokens, where these stand in a text, and the mask for it.

Redux makes tokens of a picture that stand behind those of the text. What another query sees of them is decided by a
bias on its scores: softmax(QK'/sqrt(d) + b)V with b = log(strength) at these keys; 0 hides them, exactly. The tokens'
own queries are never biased, as in ComfyUI's `attn_bias` (Apply Style Model): they go through every block as usual.
"""

from __future__ import annotations

import math

import torch

from ..errors import StyleLoomError
from ..unet import presets
from ..unet.architecture import Block
from .style_blocks import FLUX1_ALL, parse_custom

PRESETS = (presets.STYLE, presets.LAYOUT, presets.ALL, presets.CUSTOM)


def strengths(preset: str, strength: float, custom: str = "") -> dict[Block, float]:
    """Every block of FLUX.1, in forward order -> how strongly the tokens are seen there; 0 is not at all.

    Args:
        custom: for preset custom, see `style_blocks.parse_custom`; `strength` multiplies its weights.

    Raises:
        StyleLoomError: an unknown preset; a text that names no block, or a weight below 0.
    """
    if preset not in PRESETS:
        raise StyleLoomError(f"preset is {preset}", f"one of {', '.join(PRESETS)}", "Choose one of these.")
    blocks = [block for block, _, _ in FLUX1_ALL.blocks]
    if preset == presets.CUSTOM:
        chosen = {layer[:2]: share for layer, share in parse_custom(FLUX1_ALL, custom).items()}
    else:
        roles = {presets.STYLE: FLUX1_ALL.style, presets.LAYOUT: FLUX1_ALL.layout}
        chosen = roles.get(preset, dict.fromkeys(blocks, 1.0))
    low = [f"{kind} {i}: {share:g}" for (kind, i), share in chosen.items() if share < 0]
    if low:
        raise StyleLoomError(
            f"block_weights has {low[0]}",
            "weights from 0: a weight multiplies how much of the picture a block sees, and less than nothing is not "
            "defined",
            "Write 0 for blocks that must not see the picture.",
        )
    return {block: chosen.get(block, 0.0) * strength for block in blocks}


def find(context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Where the tokens stand in each row, bit for bit and in their order.

    Args:
        context: (rows, text, width). tokens: (n, width), on the same device and of the same dtype.

    Returns:
        (rows, text) bool, True at every token of every copy.
    """
    marks = torch.zeros(context.shape[:2], dtype=torch.bool, device=context.device)
    n = len(tokens)
    if context.shape[-1] != tokens.shape[-1] or not 0 < n <= context.shape[1]:
        return marks
    last = context.shape[1] - n + 1
    ends = (context[:, :last] == tokens[0]).all(-1) & (context[:, n - 1 :] == tokens[-1]).all(-1)
    for row, start in ends.nonzero().tolist():
        if torch.equal(context[row, start : start + n], tokens):
            marks[row, start : start + n] = True
    return marks


def bias(marks: torch.Tensor, total: int, strength: float, dtype: torch.dtype) -> torch.Tensor:
    """log(strength) for the tokens as keys, for every query but their own.

    Args:
        marks: from `find`. total: tokens of text and picture together.

    Returns:
        (rows, total, total); one row where all rows are alike.
    """
    if bool((marks == marks[:1]).all()):
        marks = marks[:1]
    marks = torch.nn.functional.pad(marks, (0, total - marks.shape[1]))
    out = torch.zeros(len(marks), total, total, dtype=dtype, device=marks.device)
    value = math.log(strength) if strength > 0 else -math.inf
    return out.masked_fill_(marks[:, None, :] & ~marks[:, :, None], value)


def with_bias(mask: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    """An attention mask that is there, and `more` (rows, n, n) on top of it.

    Args:
        mask: None, bool (True is seen) or a bias; (n, n), (rows, n, n) or (rows, heads, n, n).
    """
    if mask is None:
        return more
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=more.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    return mask + (more[:, None] if mask.ndim == 4 else more).to(mask)


def widened(mask: torch.Tensor, text: int, more: int) -> torch.Tensor:
    """The mask of a conditioning with room for `more` tokens behind its text, which see and are seen freely.

    Args:
        mask: (rows, n, n), a bias or bool. text: how many of the n are text.

    Returns:
        (rows, n + more, n + more) in float16, the host's dtype for it.
    """
    n = mask.shape[-1]
    out = torch.zeros(len(mask), n + more, n + more, dtype=torch.float16, device=mask.device)
    place = torch.cat([torch.arange(text), torch.arange(text, n) + more]).to(mask.device)
    out[:, place[:, None], place] = with_bias(mask, torch.zeros(1, 1, 1, dtype=torch.float16)).to(torch.float16)
    return out
