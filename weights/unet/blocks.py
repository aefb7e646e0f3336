"""The cross-attentions of the UNets, and which of them carry style or layout.

A block is what the host calls ("input", 8): one transformer of a UNet with as many cross-attentions as it is deep.
Order of a file: down, up, middle, as the attention processors of diffusers are listed, with the self-attentions
counted in between; so the n-th cross-attention in that order has the keys `{2n+1}.to_k_ip.weight` and `to_v_ip`.

Style and layout blocks: InstantStyle (arXiv 2404.02733) and its repository's `infer_style*.py`; the content block of
SDXL: B-LoRA (arXiv 2403.14572). "IPAdapter Plus" are the sets of cubiq/ComfyUI_IPAdapter_plus, which differ on SD1.5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..errors import StyleLoomError

Block = tuple[str, int]
Layer = tuple[str, int, int]

STYLE, LAYOUT, BOTH, ALL, CUSTOM = "style", "layout", "style + layout", "all", "custom"
OTHER = "IPAdapter Plus: "
PRESETS = (STYLE, LAYOUT, BOTH, ALL, CUSTOM, OTHER + STYLE, OTHER + LAYOUT, OTHER + BOTH)


@dataclass(frozen=True, eq=False)
class Architecture:
    """The cross-attentions of one UNet.

    `blocks`: (block, depth, name in diffusers) in forward order. The sets map blocks to shares of the weight.
    """

    name: str
    blocks: tuple[tuple[Block, int, str], ...]
    style: dict[Block, float]
    layout: dict[Block, float]
    content: dict[Block, float]
    other_style: dict[Block, float] = field(default_factory=dict)
    other_layout: dict[Block, float] = field(default_factory=dict)

    @property
    def layers(self) -> list[Layer]:
        """Every cross-attention in forward order: (kind, number, index)."""
        return [(*block, i) for block, depth, _ in self.blocks for i in range(depth)]

    @property
    def file_numbers(self) -> dict[Layer, int]:
        """Layer → the number before `.to_k_ip.weight` in a file."""
        middle = [layer for layer in self.layers if layer[0] == "middle"]
        order = [layer for layer in self.layers if layer[0] != "middle"] + middle
        return {layer: 2 * n + 1 for n, layer in enumerate(order)}


def _ones(*blocks: Block) -> dict[Block, float]:
    return dict.fromkeys(blocks, 1.0)


SDXL = Architecture(
    "SDXL",
    (
        (("input", 4), 2, "down_blocks.1.attentions.0"),
        (("input", 5), 2, "down_blocks.1.attentions.1"),
        (("input", 7), 10, "down_blocks.2.attentions.0"),
        (("input", 8), 10, "down_blocks.2.attentions.1"),
        (("middle", 0), 10, "mid_block.attentions.0"),
        (("output", 0), 10, "up_blocks.0.attentions.0"),
        (("output", 1), 10, "up_blocks.0.attentions.1"),
        (("output", 2), 10, "up_blocks.0.attentions.2"),
        (("output", 3), 2, "up_blocks.1.attentions.0"),
        (("output", 4), 2, "up_blocks.1.attentions.1"),
        (("output", 5), 2, "up_blocks.1.attentions.2"),
    ),
    style=_ones(("output", 1)),
    layout=_ones(("input", 8)),
    content=_ones(("output", 0)),
    other_style=_ones(("output", 1)),
    other_layout=_ones(("input", 8)),
)
SD15 = Architecture(
    "SD1.5",
    (
        (("input", 1), 1, "down_blocks.0.attentions.0"),
        (("input", 2), 1, "down_blocks.0.attentions.1"),
        (("input", 4), 1, "down_blocks.1.attentions.0"),
        (("input", 5), 1, "down_blocks.1.attentions.1"),
        (("input", 7), 1, "down_blocks.2.attentions.0"),
        (("input", 8), 1, "down_blocks.2.attentions.1"),
        (("middle", 0), 1, "mid_block.attentions.0"),
        (("output", 3), 1, "up_blocks.1.attentions.0"),
        (("output", 4), 1, "up_blocks.1.attentions.1"),
        (("output", 5), 1, "up_blocks.1.attentions.2"),
        (("output", 6), 1, "up_blocks.2.attentions.0"),
        (("output", 7), 1, "up_blocks.2.attentions.1"),
        (("output", 8), 1, "up_blocks.2.attentions.2"),
        (("output", 9), 1, "up_blocks.3.attentions.0"),
        (("output", 10), 1, "up_blocks.3.attentions.1"),
        (("output", 11), 1, "up_blocks.3.attentions.2"),
    ),
    style=_ones(("output", 3), ("output", 4), ("output", 5)),
    layout=_ones(("input", 7), ("input", 8), ("middle", 0)),
    content={},
    # By position in forward order: style 0, 1, 2, 3 and 9 to 15; composition a quarter at 4 and the whole at 5.
    other_style=_ones(*(("input", n) for n in (1, 2, 4, 5)), *(("output", n) for n in (5, 6, 7, 8, 9, 10, 11))),
    other_layout={("input", 7): 0.25, ("input", 8): 1.0},
)
ARCHITECTURES = (SDXL, SD15)


def choose(
    architecture: Architecture, preset: str, weight: float, layout_weight: float, two_pictures: bool, custom: str = ""
) -> dict[Layer, tuple[float, str]]:
    """What is injected where.

    Args:
        architecture: the UNet's.
        preset: one of `PRESETS`.
        weight: of the picture of the style; in preset layout of the only picture that acts.
        layout_weight: of the layout blocks where style and layout act together.
        two_pictures: whether the layout blocks have a picture of their own.
        custom: for preset custom, see `parse_custom`.

    Returns:
        Layer → (weight, "style" or "layout": whose picture). Layers of weight 0 are left out.

    Raises:
        StyleLoomError: unknown preset; custom text that names no block.
    """
    plain = preset.removeprefix(OTHER)
    other = plain != preset
    style = architecture.other_style if other else architecture.style
    layout = architecture.other_layout if other else architecture.layout
    picture = LAYOUT if two_pictures else STYLE
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


_ENTRY = re.compile(r"\s*(?P<name>[a-z0-9_. ]+?)\s*[:=]\s*(?P<share>[-+]?\d*\.?\d+)\s*$")


def parse_custom(architecture: Architecture, text: str) -> dict[Layer, float]:
    """Weights of single blocks, `name: weight` with commas or line ends between.

    A name is the host's (`output 1`, or `output 1 3` for one layer of it), diffusers' (`up_blocks.0.attentions.1`), or
    the block's place in forward order (`6`, the numbers of IPAdapter Plus). A later entry overrides an earlier one.

    Raises:
        StyleLoomError: nothing given; an entry that cannot be read or names no block of this UNet.
    """
    names: dict[str, list[Layer]] = {}
    for place, (block, depth, diffusers) in enumerate(architecture.blocks):
        layers = [(*block, i) for i in range(depth)]
        for name in (f"{block[0]} {block[1]}", str(place), diffusers.replace(".", " ").replace("_", " ")):
            names[name] = layers
        names |= {f"{block[0]} {block[1]} {i}": [layer] for i, layer in enumerate(layers)}
    names["middle"] = names["middle 0"]
    known = ", ".join(f"{block[0]} {block[1]}" for block, _, _ in architecture.blocks)
    found: dict[Layer, float] = {}
    for entry in re.split(r"[,;\n]", text):
        if not entry.strip():
            continue
        match = _ENTRY.match(entry.lower())
        name = " ".join(re.split(r"[\s_.]+", match["name"])) if match else ""
        if name not in names:
            raise StyleLoomError(
                f"block_weights has {entry.strip()!r}",
                f"a block of {architecture.name} and its weight; the blocks are {known}",
                "Write for example: output 1: 1.0, input 8: 0.5",
            )
        found |= dict.fromkeys(names[name], float(match["share"]))
    if not found:
        raise StyleLoomError(
            "preset is custom and block_weights is empty",
            f"blocks and weights; the blocks of {architecture.name} are {known}",
            "Write for example: output 1: 1.0, input 8: 0.5",
        )
    return found
