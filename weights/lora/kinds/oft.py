"""OFT: the rows of the weight are turned in blocks, ΔW = s² · (Rᵀ − 1) W, with R = (1 + Q)(1 − Q)⁻¹ and Q = B − Bᵀ.

The square of the strength s is the host's: its merge multiplies by it twice. Its merge also leaves out `rescale`, a
factor for each row; so does the row form here, and both say so. Alpha is no scale but a bound on ‖Q‖.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...row_adapters.terms import OutputTransform, Term
from ..low_rank import LowRank
from .base import ALPHA, Kind, NoTerm, Parts, Place, size, weight_only, wide

_MULTIPLIES = "It multiplies the weights of the model instead of adding to them"


def cayley(blocks: torch.Tensor, bound: float) -> torch.Tensor:
    """Rotations (…, size, size) from any blocks of that shape: the Cayley transform of Q = blocks − blocksᵀ, which is
    shrunk to the Frobenius norm `bound` over all blocks where it is longer; 0: no bound."""
    skew = blocks - blocks.transpose(-1, -2)
    if bound > 0:
        norm = skew.norm() + 1e-8
        skew = torch.where(norm > bound, skew * (bound / norm), skew)
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.linalg.solve(one - skew, one + skew)  # both are functions of Q, so their order does not matter


class OFTKind(Kind):
    """oft_blocks (number, size, size). `oft_diag` (older LyCORIS) and `oft_R` (PEFT) are names that the host does not
    read: they are known here so that messages can name the kind."""

    name = "OFT"
    endings = {
        "oft_blocks": r"\.oft_blocks",
        "oft_diag": r"\.oft_diag",
        "oft_R": r"\.oft_R(?:\.[^.]+)?(?:\.weight)?",
        "rescale": r"\.rescale",
    } | ALPHA
    host_name = "oft"
    host_order = ("oft_blocks", "rescale", "alpha", "dora")
    not_merged = _MULTIPLIES
    not_scaled = _MULTIPLIES
    ndim = 3

    def claims(self, parts: Parts) -> bool:
        """Its parts have the names of those of BOFT; the blocks have one axis less."""
        blocks = parts.get("oft_blocks")
        return super().claims(parts) and (blocks is None or blocks.ndim != 4)

    def problem(self, parts: Parts) -> tuple[str, str] | None:
        blocks = parts.get("oft_blocks")
        if blocks is None:
            if "oft_diag" in parts or "oft_R" in parts:
                return None
            return f"it has {', '.join(sorted(parts))} and lacks the oft_blocks of an OFT", "all of its parts"
        if blocks.ndim != self.ndim or blocks.shape[-1] != blocks.shape[-2]:
            return f"oft_blocks is {size(blocks)}", "square blocks"
        return None

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        blocks = parts["oft_blocks"]
        return [(blocks.shape[-3] * blocks.shape[-1], None)]

    def turn(self, parts: Parts, strength: float) -> torch.Tensor:
        """L (out, out) with W' = W + L W."""
        rotations = cayley(parts["oft_blocks"], float(parts.get("alpha") or 0))
        one = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device)
        return torch.block_diag(*(strength**2 * (rotations.transpose(-1, -2) - one)))

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        weight_only(self, place)
        if not place.whole:
            raise NoTerm(f"{self.name} on a part of a layer")
        return turning(self.turn, parts, place)

    def host_leaves_out(self, parts: Parts) -> str:
        return "the rescale of an OFT" if parts.get("rescale") is not None else ""


def turning(turn: Callable[[Parts, float], torch.Tensor], parts: Parts, place: Place) -> OutputTransform:
    """The row form of an adapter that acts on the rows of the weight."""
    names = [name for name, value in parts.items() if isinstance(value, torch.Tensor)]
    numbers = {name: value for name, value in parts.items() if name not in names}

    def make(held: list[torch.Tensor], strength: float, like: torch.Tensor) -> torch.Tensor:
        there = {name: wide(tensor.to(like.device)) for name, tensor in zip(names, held, strict=True)}
        return turn(numbers | there, strength)

    return OutputTransform(place.layer, place.source, make, holds=[parts[name] for name in names])
