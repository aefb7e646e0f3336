"""Which blocks of a diffusion transformer carry content and which style.

| model | blocks | content | style | at the border |
|---|---|---|---|---|
| FLUX.1 | 19 with two streams and 38 with one, counted through from 1 to 57 | 20 to 29 | 30 to 57 | 30 and 31 |

Source: SplitFlux (arXiv 2511.15258), by exchanging the prompt of single blocks: the 19 with two streams change neither
content nor style; into 30 and 31 content leaks, which is why content is trained at a low rank there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class DiTBlocks:
    """A transformer of blocks with two streams and, after them, blocks with one.

    Attributes:
        name: What messages call it.
        double, single: How many blocks of each kind.
        content, style, border: Numbers of blocks, counted through from 1; those at the border are among the style.
        source: Where the roles are from.
    """

    name: str
    double: int
    single: int
    content: range
    style: range
    border: range
    source: str

    def block_of(self, stem: str) -> int | None:
        """The number of the block, counted through from 1, that a LoRA's layer is in; None for layers outside of the
        blocks. In the checkpoint's names, in those of diffusers, with dots or underscores."""
        flat = stem.replace(".", "_")
        found = _SINGLE.search(flat)
        if found:
            number = self.double + int(found[1]) + 1
            return number if int(found[1]) < self.single else None
        found = _DOUBLE.search(flat)
        return int(found[1]) + 1 if found and int(found[1]) < self.double else None

    def words(self, blocks: range) -> str:
        """As people look for them in the names of layers."""
        first, last = blocks[0] - self.double - 1, blocks[-1] - self.double - 1
        return f"blocks {blocks[0]} to {blocks[-1]} of {self.double + self.single}, single_blocks {first} to {last}"


_SINGLE = re.compile(r"(?:^|_)single_(?:transformer_)?blocks_(\d+)(?:_|$)")
_DOUBLE = re.compile(r"(?:^|_)(?:double|transformer)_blocks_(\d+)(?:_|$)")

FLUX1 = DiTBlocks(
    "FLUX.1", 19, 38, range(20, 30), range(30, 58), range(30, 32), "SplitFlux, arXiv 2511.15258"
)
