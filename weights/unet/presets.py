"""Presets of InstantStyle on the blocks of a UNet: where a picture is injected, and how strongly."""

from __future__ import annotations

import math
import re

from ..errors import StyleLoomError
from . import weight_types
from .architecture import Architecture, Layer

STYLE, LAYOUT, BOTH, ALL, CUSTOM = "style", "layout", "style + layout", "all", "custom"
PRECISE_STYLE, PRECISE_LAYOUT = "precise style", "precise layout"
OTHER = "IPAdapter Plus: "
PRESETS = (
    *(STYLE, LAYOUT, BOTH, ALL, CUSTOM, OTHER + STYLE, OTHER + LAYOUT, OTHER + BOTH),
    *(PRECISE_STYLE, PRECISE_LAYOUT),
    *(OTHER + name for name in weight_types.TYPES),
)
# Whose tokens a layer gets where its sides are turned round: the negative side sees this picture.
AWAY_FROM = {STYLE: "away from style", LAYOUT: "away from layout"}


def is_precise(preset: str) -> bool:
    """Whether some blocks of a preset are turned round, and `boost` counts."""
    return preset.removeprefix(OTHER) in (PRECISE_STYLE, PRECISE_LAYOUT, *weight_types.PRECISE)


def choose(
    architecture: Architecture,
    preset: str,
    weight: float,
    layout_weight: float,
    two_pictures: bool,
    custom: str = "",
    boost: float = 1.0,
) -> dict[Layer, tuple[float, str]]:
    """What is injected where.

    Args:
        architecture: the UNet's.
        preset: one of `PRESETS`.
        weight: of the picture of the style; in preset layout of the only picture that acts.
        layout_weight: of the layout blocks where style and layout act together.
        two_pictures: whether the layout blocks have a picture of their own.
        custom: for preset custom, see `parse_custom`; in a precise preset it takes the place of the table, if given.
        boost: of the blocks that a precise preset turns round.

    Returns:
        Layer → (weight, "style" or "layout": whose picture, or one of `AWAY_FROM`). Layers of weight 0 are left out.

    Raises:
        StyleLoomError: unknown preset; custom text that names no block.
    """
    plain = preset.removeprefix(OTHER)
    other = plain != preset
    style = architecture.other_style if other else architecture.style
    layout = architecture.other_layout if other else architecture.layout
    picture = LAYOUT if two_pictures else STYLE
    if is_precise(preset) or plain in weight_types.TYPES:
        return _typed(architecture, preset, weight, layout_weight, two_pictures, custom, boost)
    everything = {block: 1.0 for block, _, _ in architecture.blocks}
    if plain == STYLE:
        chosen = {block: (share * weight, STYLE) for block, share in style.items()}
    elif plain == LAYOUT:
        chosen = {block: (share * weight, picture) for block, share in layout.items()}
    elif plain == BOTH:
        chosen = {block: (share * weight, STYLE) for block, share in style.items()}
        chosen |= {block: (share * layout_weight, picture) for block, share in layout.items()}
    elif preset == ALL:
        chosen = {block: (weight, STYLE) for block in everything}
        if two_pictures:
            chosen |= {block: (layout_weight, LAYOUT) for block in architecture.layout}
    elif preset == CUSTOM:
        given = parse_custom(architecture, custom)
        whose = {block: picture if block in architecture.layout else STYLE for block in everything}
        return {layer: (share * weight, whose[layer[:2]]) for layer, share in given.items() if share * weight}
    else:
        raise StyleLoomError(f"preset is {preset!r}", f"one of {', '.join(PRESETS)}", "Choose one of the list.")
    return {layer: chosen[layer[:2]] for layer in architecture.layers if chosen.get(layer[:2], (0,))[0]}


def _typed(
    architecture: Architecture,
    preset: str,
    weight: float,
    layout_weight: float,
    two_pictures: bool,
    custom: str,
    boost: float,
) -> dict[Layer, tuple[float, str]]:
    """`choose` for the presets of `weight_types.py`."""
    if preset == PRECISE_STYLE:
        table = weight_types.precise_style(architecture.style, architecture.layout, weight, boost)
    elif preset == PRECISE_LAYOUT:
        table = weight_types.precise_layout(architecture.layout, architecture.style, weight, boost)
    elif preset.startswith(OTHER):
        table = weight_types.shares(architecture, preset.removeprefix(OTHER), weight, layout_weight, boost)
    else:
        raise StyleLoomError(f"preset is {preset!r}", f"one of {', '.join(PRESETS)}", "Choose one of the list.")
    picture = LAYOUT if two_pictures else STYLE
    kept = picture if preset.removeprefix(OTHER) in (PRECISE_LAYOUT, weight_types.LAYOUT_PRECISE) else STYLE
    whose = {weight_types.STYLE: STYLE, weight_types.LAYOUT: picture, weight_types.AWAY: AWAY_FROM[kept]}
    if is_precise(preset) and custom.strip():
        given = parse_custom(architecture, custom)
        roles = {block: weight_types.AWAY for block, _, _ in architecture.blocks}
        roles |= {block: role for block, (_, role) in table.items()}
        if PRECISE_STYLE in preset or weight_types.STYLE_PRECISE in preset:
            layout = [block for block, (_, role) in table.items() if role == weight_types.AWAY]
            roles = {block: weight_types.AWAY if block in layout else weight_types.STYLE for block in roles}
        return {layer: (share * weight, whose[roles[layer[:2]]]) for layer, share in given.items() if share * weight}
    chosen = {block: (share, whose[role]) for block, (share, role) in table.items()}
    return {layer: chosen[layer[:2]] for layer in architecture.layers if chosen.get(layer[:2], (0,))[0]}


_ENTRY = re.compile(r"\s*(?P<name>[a-z0-9_. ]+?)\s*[:=]\s*(?P<share>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*$")


def parse_custom(architecture: Architecture, text: str) -> dict[Layer, float]:
    """Weights of single blocks, `name: weight` with commas or line ends between.

    A name is the host's (`output 1`, or `output 1 3` for one layer of it), diffusers' (`up_blocks.0.attentions.1`, or
    `up_blocks.0` for all of that level), or the block's place in forward order (`6`, the numbers of IPAdapter Plus). A
    later entry overrides an earlier one.

    Raises:
        StyleLoomError: nothing given; an entry that cannot be read or names no block of this UNet; no finite weight.
    """
    names: dict[str, list[Layer]] = {}
    for place, (block, depth, diffusers) in enumerate(architecture.blocks):
        layers = [(*block, i) for i in range(depth)]
        for name in (f"{block[0]} {block[1]}", str(place), diffusers.replace(".", " ").replace("_", " ")):
            names[name] = layers
        names |= {f"{block[0]} {block[1]} {i}": [layer] for i, layer in enumerate(layers)}
        level = diffusers.partition(".attentions")[0].replace(".", " ").replace("_", " ")
        names[level] = names.get(level, []) + layers
    names["middle"] = names["middle 0"]
    known = ", ".join(f"{block[0]} {block[1]}" for block, _, _ in architecture.blocks)
    found: dict[Layer, float] = {}
    for entry in re.split(r"[,;\n]", text):
        if not entry.strip():
            continue
        match = _ENTRY.match(entry.lower())
        name = " ".join(re.split(r"[\s_.]+", match["name"])) if match else ""
        share = float(match["share"]) if match else 0.0
        if name not in names or not math.isfinite(share):
            raise StyleLoomError(
                f"block_weights has {entry.strip()!r}",
                f"a block of {architecture.name} and its weight; the blocks are {known}",
                "Write for example: output 1: 1.0, input 8: 0.5",
            )
        found |= dict.fromkeys(names[name], share)
    if not found:
        raise StyleLoomError(
            "preset is custom and block_weights is empty",
            f"blocks and weights; the blocks of {architecture.name} are {known}",
            "Write for example: output 1: 1.0, input 8: 0.5",
        )
    return found
