"""Where an IP-Adapter acts in a diffusion transformer: the presets of Style Block Injector on its blocks.

FLUX.1: style and content blocks by SplitFlux, see `blocks.py`; what the node calls layout are there the content blocks.
For SD3.5 no such split is published.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

from ..errors import StyleLoomError
from ..unet import presets
from ..unet.architecture import Block, Layer
from .blocks import FLUX1, DiTBlocks

PRESETS = (presets.STYLE, presets.LAYOUT, presets.BOTH, presets.ALL, presets.CUSTOM)


@dataclass(frozen=True)
class DiTArchitecture:
    """The blocks that an adapter has weights for. It stands where a UNet's `Architecture` does.

    Attributes:
        name: Of the base model. counts: (kind of block, how many), in forward order.
        split: The published roles of its blocks, or None.
        example: Of block_weights.
    """

    name: str
    counts: tuple[tuple[str, int], ...]
    split: DiTBlocks | None
    example: str

    @cached_property
    def blocks(self) -> tuple[tuple[Block, int, str], ...]:
        """(block, 1, its name in words), in forward order."""
        return tuple(((kind, i), 1, f"{kind} {i}") for kind, count in self.counts for i in range(count))

    @property
    def layers(self) -> list[Layer]:
        return [(*block, 0) for block, _, _ in self.blocks]

    def _role(self, numbers: range) -> dict[Block, float]:
        """Blocks counted through from 1, as far as the adapter has them."""
        all_blocks = [block for block, _, _ in self.blocks]
        return {all_blocks[n - 1]: 1.0 for n in numbers if n <= len(all_blocks)}

    @cached_property
    def style(self) -> dict[Block, float]:
        return self._role(self.split.style) if self.split else {}

    @cached_property
    def layout(self) -> dict[Block, float]:
        return self._role(self.split.content) if self.split else {}

    @property
    def known(self) -> str:
        return ", ".join(f"{kind} 0 to {kind} {count - 1}" for kind, count in self.counts)


_EXAMPLE = "double 3: 1, single 12-37: 0.5"
FLUX1_DOUBLE = DiTArchitecture("FLUX.1", (("double", FLUX1.double),), FLUX1, "double 3: 1, double 10-18: 0.5")
FLUX1_ALL = DiTArchitecture("FLUX.1", (("double", FLUX1.double), ("single", FLUX1.single)), FLUX1, _EXAMPLE)
SD35_LARGE = DiTArchitecture("SD3.5-large", (("joint", 38),), None, "joint 3: 1, joint 12-37: 0.5")


def choose(
    architecture: DiTArchitecture,
    name: str,
    preset: str,
    weight: float,
    layout_weight: float,
    two_pictures: bool,
    custom: str = "",
) -> dict[Layer, tuple[float, str]]:
    """What is injected where, as `unet.presets.choose` does for a UNet.

    Args:
        name: Of the adapter's file, for messages.

    Raises:
        StyleLoomError: A preset that is made for UNets, or that reaches none of the adapter's blocks; a text for
            preset custom that names no block.
    """
    if preset not in PRESETS:
        raise StyleLoomError(
            f"preset is {preset}, and {name} is for {architecture.name}, a transformer",
            f"one of {', '.join(PRESETS)}: the others are tables over the blocks of a UNet",
            "Choose another preset.",
        )
    if preset == presets.CUSTOM:
        given = parse_custom(architecture, custom)
        picture = presets.LAYOUT if two_pictures else presets.STYLE
        return {
            layer: (share * weight, picture if layer[:2] in architecture.layout else presets.STYLE)
            for layer, share in given.items()
            if share * weight
        }
    if preset != presets.ALL and not (architecture.style or architecture.layout):
        split = architecture.split
        why = (
            f"{split.source} finds content in {split.words(split.content)} and style in {split.words(split.style)}, "
            f"and this adapter has {architecture.known} only"
            if split
            else "which of them make style is not published"
        )
        raise StyleLoomError(
            f"preset {preset} reaches none of the blocks of {name} ({architecture.name}): {why}",
            "preset all or custom",
            f"Choose all, or custom with block_weights such as: {architecture.example}",
        )
    return presets.choose(architecture, preset, weight, layout_weight, two_pictures)


_ENTRY = re.compile(
    r"\s*(?P<kind>[a-z_]+?)(?:_blocks|_block| blocks| block)?[\s_.]+(?P<first>\d+)(?:\s*-\s*(?P<last>\d+))?\s*[:=]"
    r"\s*(?P<share>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*$"
)


def parse_custom(architecture: DiTArchitecture, text: str) -> dict[Layer, float]:
    """Weights of single blocks, `double 3: 1` or `single 12-20: 0.5`, with commas or line ends between.

    Blocks are numbered from 0 within their kind, as in the checkpoint (`double_blocks.3` is the same as `double 3`). A
    later entry overrides an earlier one.

    Raises:
        StyleLoomError: nothing given; an entry that cannot be read or names no block; no finite weight.
    """
    counts = dict(architecture.counts)
    found: dict[Layer, float] = {}
    for entry in re.split(r"[,;\n]", text):
        if not entry.strip():
            continue
        match = _ENTRY.match(entry.lower())
        share = float(match["share"]) if match else math.nan
        first = int(match["first"]) if match else 0
        last = int(match["last"] or first) if match else 0
        if not match or first > last or last >= counts.get(match["kind"], 0) or not math.isfinite(share):
            raise StyleLoomError(
                f"block_weights has {entry.strip()!r}",
                f"a block of {architecture.name} and its weight; this adapter has {architecture.known}",
                f"Write for example: {architecture.example}",
            )
        found |= {(match["kind"], i, 0): share for i in range(first, last + 1)}
    if not found:
        raise StyleLoomError(
            "preset is custom and block_weights is empty",
            f"blocks and weights; this adapter has {architecture.known}",
            f"Write for example: {architecture.example}",
        )
    return found
