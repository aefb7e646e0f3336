"""IPAdapter Plus's weight types, and the precise presets, as shares of the weight by block.

Facts from cubiq/ComfyUI_IPAdapter_plus (commit 9d076a3): a type is a rule over the place t of a transformer in forward
order, 0 to L - 1, with L = 11 on SDXL and 16 on SD1.5; the middle counts. What that pack computes beside its rule is
left out: it patches ("middle", 1), which no UNet has, so that its own middle block never sees the picture.

Precise: in some blocks the sides are turned round. There the negative side sees the picture and the positive side sees
nothing, so that guidance, negative + cfg * (positive - negative), moves away from what these blocks take from it.
"""

from __future__ import annotations

from .architecture import Architecture, Block

STYLE, LAYOUT, AWAY = "style", "layout", "away"  # whose picture; away: the sides turned round

LINEAR, EASE_IN, EASE_OUT = "linear", "ease in", "ease out"
EASE_IN_OUT, REVERSE_IN_OUT = "ease in-out", "reverse in-out"
WEAK_INPUT, WEAK_OUTPUT, WEAK_MIDDLE, STRONG_MIDDLE = "weak input", "weak output", "weak middle", "strong middle"
STRONG_STYLE, STRONG_BOTH = "strong style transfer", "strong style and composition"
STYLE_PRECISE, LAYOUT_PRECISE = "style transfer precise", "composition precise"
TYPES = (
    LINEAR,
    EASE_IN,
    EASE_OUT,
    EASE_IN_OUT,
    REVERSE_IN_OUT,
    WEAK_INPUT,
    WEAK_OUTPUT,
    WEAK_MIDDLE,
    STRONG_MIDDLE,
    STRONG_STYLE,
    STRONG_BOTH,
    STYLE_PRECISE,
    LAYOUT_PRECISE,
)
PRECISE = (STYLE_PRECISE, LAYOUT_PRECISE)

_WEAK = 0.2
_WEAKENED = {
    WEAK_INPUT: ("input",),
    WEAK_OUTPUT: ("output",),
    WEAK_MIDDLE: ("middle",),
    STRONG_MIDDLE: ("input", "output"),
}


def shares(
    architecture: Architecture, name: str, weight: float, layout_weight: float, boost: float
) -> dict[Block, tuple[float, str]]:
    """Block -> (weight, whose picture) of one of `TYPES`.

    Args:
        weight, layout_weight: as in `presets.choose`.
        boost: of the blocks that are turned round, in the precise types.
    """
    blocks = [block for block, _, _ in architecture.blocks]
    style, layout = architecture.other_style, architecture.other_layout
    if name == STRONG_STYLE:
        return {block: (weight, STYLE) for block in blocks if block not in layout}
    if name == STRONG_BOTH:
        return {block: (layout_weight, LAYOUT) if block in layout else (weight, STYLE) for block in blocks}
    if name == STYLE_PRECISE:
        return precise_style(style, layout, weight, boost)
    if name == LAYOUT_PRECISE:
        rest = {block: 0.1 for block in blocks if block not in layout}
        return precise_layout(layout, rest | style, weight, boost)
    if name in _WEAKENED:
        return {block: (weight * (_WEAK if block[0] in _WEAKENED[name] else 1.0), STYLE) for block in blocks}
    return {block: (weight * _ease(name, t, len(blocks)), STYLE) for t, block in enumerate(blocks)}


def precise_style(style: dict[Block, float], layout: dict[Block, float], weight: float, boost: float):
    """The style blocks see the picture; the layout blocks are turned round."""
    made = {block: (share * boost, AWAY) for block, share in layout.items()}
    return made | {block: (share * weight, STYLE) for block, share in style.items()}


def precise_layout(layout: dict[Block, float], others: dict[Block, float], weight: float, boost: float):
    """The layout blocks see the picture; `others` are turned round."""
    made = {block: (share * boost, AWAY) for block, share in others.items()}
    return made | {block: (share * weight, LAYOUT) for block, share in layout.items()}


def _ease(name: str, t: int, length: int) -> float:
    half = length / 2
    rising = {
        LINEAR: 1.0,
        EASE_IN: 1 - t / length,
        EASE_OUT: t / length,
        EASE_IN_OUT: 1 - abs(t - half) / half,
        REVERSE_IN_OUT: abs(t - half) / half,
    }[name]
    return 1.0 if name == LINEAR else 0.05 + 0.95 * rising
