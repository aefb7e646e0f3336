"""The UNets of SDXL and SD1.5: one table, from which every name, depth, kernel and role of their blocks is made.

Both are built alike: a convolution, levels of two blocks with a step down between them, the middle, and the levels back
with three blocks each. A checkpoint numbers the blocks of each half through; diffusers counts inside levels:

| checkpoint | diffusers |
|---|---|
| `input_blocks.{1 + 3·level + i}` | `down_blocks.{level}.resnets.{i}` and `.attentions.{i}` |
| `input_blocks.{3·(level + 1)}` | `down_blocks.{level}.downsamplers.0` |
| `middle_block.{0, 1, 2}` | `mid_block.resnets.0`, `.attentions.0`, `.resnets.1` |
| `output_blocks.{3·up + i}` | `up_blocks.{up}.resnets.{i}` and `.attentions.{i}`; up counts the levels backwards |

A block is what the host calls ("input", 8): one transformer with as many cross-attentions as it is deep.

Style and layout blocks: InstantStyle (arXiv 2404.02733) and its repository's `infer_style*.py`; the content block of
SDXL: B-LoRA (arXiv 2403.14572). "IPAdapter Plus" are the sets of cubiq/ComfyUI_IPAdapter_plus, which differ on SD1.5.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

Block = tuple[str, int]
Layer = tuple[str, int, int]
Kernel = tuple[int, ...]

_LINEARS = tuple(f"attn{a}.to_{p}" for a in (1, 2) for p in ("q", "k", "v", "out.0")) + ("ff.net.0.proj", "ff.net.2")
_NORMS = ("norm1", "norm2", "norm3")
_WIDE, _POINT, _NONE = (3, 3), (1, 1), ()
# A residual block: checkpoint → (diffusers, kernel). Only blocks that change the width have the last one.
_RESNET: dict[str, tuple[str, Kernel]] = {
    "in_layers.2": ("conv1", _WIDE),
    "emb_layers.1": ("time_emb_proj", _NONE),
    "out_layers.3": ("conv2", _WIDE),
    "in_layers.0": ("norm1", _NONE),
    "out_layers.0": ("norm2", _NONE),
    "skip_connection": ("conv_shortcut", _POINT),
}
_ENDS: dict[str, tuple[str, Kernel]] = {
    "input_blocks.0.0": ("conv_in", _WIDE),
    "out.0": ("conv_norm_out", _NONE),
    "out.2": ("conv_out", _WIDE),
    "time_embed.0": ("time_embedding.linear_1", _NONE),
    "time_embed.2": ("time_embedding.linear_2", _NONE),
}
_SIZE_EMBEDDING: dict[str, tuple[str, Kernel]] = {
    "label_emb.0.0": ("add_embedding.linear_1", _NONE),
    "label_emb.0.2": ("add_embedding.linear_2", _NONE),
}


class UNetLayer(NamedTuple):
    """A layer's name in diffusers, and the kernel of its weight: () for linear layers and norms."""

    diffusers: str
    kernel: Kernel


def checkpoint_name(block: Block) -> str:
    """("input", 8) → "input_blocks.8", what names of a checkpoint begin with."""
    return "middle_block" if block[0] == "middle" else f"{block[0]}_blocks.{block[1]}"


@dataclass(frozen=True, eq=False)
class Architecture:
    """One UNet.

    Attributes:
        depths: Transformer layers in each block of a level, the finest level first; 0: no transformer.
        middle: Those of the middle block.
        linear: `proj_in` and `proj_out` of its transformers are linear layers, else convolutions over one pixel.
        size_embedding: It is told the picture's size (`label_emb`).
        style, layout, content: Blocks with that role → their share of the weight.
        other_style, other_layout: The same in IPAdapter Plus.
    """

    name: str
    depths: tuple[int, ...]
    middle: int
    linear: bool
    size_embedding: bool
    style: dict[Block, float] = field(default_factory=dict)
    layout: dict[Block, float] = field(default_factory=dict)
    content: dict[Block, float] = field(default_factory=dict)
    other_style: dict[Block, float] = field(default_factory=dict)
    other_layout: dict[Block, float] = field(default_factory=dict)

    def _places(self) -> Iterator[tuple[Block, int, str]]:
        """(block, depth, name in diffusers with {} for `resnets` or `attentions`), in forward order, the middle left
        out."""
        for level, depth in enumerate(self.depths):
            for i in (0, 1):
                yield ("input", 1 + 3 * level + i), depth, f"down_blocks.{level}.{{}}.{i}"
        for up, depth in enumerate(reversed(self.depths)):
            for i in (0, 1, 2):
                yield ("output", 3 * up + i), depth, f"up_blocks.{up}.{{}}.{i}"

    @functools.cached_property
    def blocks(self) -> tuple[tuple[Block, int, str], ...]:
        """(block, depth, name in diffusers) of every transformer, in forward order."""
        found = [(block, depth, name.format("attentions")) for block, depth, name in self._places() if depth]
        middle = (("middle", 0), self.middle, "mid_block.attentions.0")
        down = sum(block[0] == "input" for block, _, _ in found)
        return (*found[:down], middle, *found[down:])

    @property
    def layers(self) -> list[Layer]:
        """Every cross-attention in forward order: (kind, number, index)."""
        return [(*block, i) for block, depth, _ in self.blocks for i in range(depth)]

    @property
    def file_numbers(self) -> dict[Layer, int]:
        """Cross-attention → the number before `.to_k_ip.weight` in an IP-Adapter file. Its order is down, up, middle,
        as diffusers lists attention processors, with the self-attentions counted in between: the n-th has `2n + 1`."""
        middle = [layer for layer in self.layers if layer[0] == "middle"]
        order = [layer for layer in self.layers if layer[0] != "middle"] + middle
        return {layer: 2 * n + 1 for n, layer in enumerate(order)}

    @functools.cached_property
    def weights(self) -> dict[str, UNetLayer]:
        """Every layer that has a weight: its name in the checkpoint → its name in diffusers, and its kernel. Skip
        convolutions are named for every residual block."""
        found = dict(_ENDS) | (_SIZE_EMBEDDING if self.size_embedding else {})
        deepest = len(self.depths) - 1
        for block, depth, name in self._places():
            own = checkpoint_name(block)
            found |= {f"{own}.0.{a}": (f"{name.format('resnets')}.{b}", k) for a, (b, k) in _RESNET.items()}
            if depth:
                found |= {f"{own}.1.{n}": (f"{name.format('attentions')}.{n}", k) for n, k in self._transformer(depth)}
            level = (block[1] - 1 if block[0] == "input" else block[1]) // 3
            if block[0] == "input" and level < deepest and block[1] == 3 * level + 2:
                found[f"input_blocks.{3 * level + 3}.0.op"] = (f"down_blocks.{level}.downsamplers.0.conv", _WIDE)
            if block[0] == "output" and level < deepest and block[1] == 3 * level + 2:
                place = 2 if depth else 1  # behind the transformer
                found[f"{own}.{place}.conv"] = (f"up_blocks.{level}.upsamplers.0.conv", _WIDE)
        for number, resnet in ((0, 0), (2, 1)):
            found |= {
                f"middle_block.{number}.{a}": (f"mid_block.resnets.{resnet}.{b}", k) for a, (b, k) in _RESNET.items()
            }
        found |= {f"middle_block.1.{n}": (f"mid_block.attentions.0.{n}", k) for n, k in self._transformer(self.middle)}
        return {name: UNetLayer(*layer) for name, layer in found.items()}

    def _transformer(self, depth: int) -> Iterator[tuple[str, Kernel]]:
        kernel = _NONE if self.linear else _POINT
        yield from (("norm", _NONE), ("proj_in", kernel), ("proj_out", kernel))
        for block in range(depth):
            yield from ((f"transformer_blocks.{block}.{name}", _NONE) for name in (*_LINEARS, *_NORMS))

    def has(self, block: Block, index: int = 0) -> bool:
        """Whether it has that transformer, with a layer of that index."""
        return any(block == own and index < depth for own, depth, _ in self.blocks)


def _ones(*blocks: Block) -> dict[Block, float]:
    return dict.fromkeys(blocks, 1.0)


SDXL = Architecture(
    "SDXL",
    depths=(0, 2, 10),
    middle=10,
    linear=True,
    size_embedding=True,
    style=_ones(("output", 1)),
    layout=_ones(("input", 8)),
    content=_ones(("output", 0)),
    other_style=_ones(("output", 1)),
    other_layout=_ones(("input", 8)),
)
SD15 = Architecture(
    "SD1.5",
    depths=(1, 1, 1, 0),
    middle=1,
    linear=False,
    size_embedding=False,
    style=_ones(("output", 3), ("output", 4), ("output", 5)),
    layout=_ones(("input", 7), ("input", 8), ("middle", 0)),
    # By position in forward order: style 0, 1, 2, 3 and 9 to 15; composition a quarter at 4 and the whole at 5.
    other_style=_ones(*(("input", n) for n in (1, 2, 4, 5)), *(("output", n) for n in (5, 6, 7, 8, 9, 10, 11))),
    other_layout={("input", 7): 0.25, ("input", 8): 1.0},
)
ARCHITECTURES = (SDXL, SD15)

# Every transformer that a UNet of this build may have: the numbers of a block do not depend on the depths.
_ANY = Architecture("any", depths=(1, 1, 1, 1), middle=1, linear=False, size_embedding=False)


@functools.cache
def _flat_names() -> dict[str, Block]:
    """Every spelling of a transformer, with underscores → the block."""
    found = {}
    for block, _, diffusers in _ANY.blocks:
        found[f"_{checkpoint_name(block)}.1_".replace(".", "_")] = block
        found[f"_{diffusers}_".replace(".", "_")] = block
    return found


def transformer_of(layer: str) -> tuple[Block, int] | None:
    """(block, layer of its transformer) of a layer's name in any spelling, dotted or with underscores, with anything
    before it; layer 0 for what is beside the layers (`proj_in`). None outside the transformers of a UNet."""
    flat = "_" + layer.replace(".", "_") + "_"
    for name, block in _flat_names().items():
        _, found, rest = flat.partition(name)
        if found:
            index = rest.partition("transformer_blocks_")[2].partition("_")[0]
            return block, int(index) if index.isdigit() else 0
    return None
