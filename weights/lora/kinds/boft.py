"""BOFT: the rows of the weight are turned in several stages of blocks, each over other rows (a butterfly).

Stage i turns blocks of rows that lie 2ⁱ·size/2 apart, with the rotation 1 + s (Rᵢ − 1); after all stages each row has
a factor `rescale`. ΔW = s · (product of the stages − 1) W, so the strength s acts twice, as in the host's merge. Alpha
is a bound on ‖Q‖, see `oft.cayley`; a file without one has no bound.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import Parts, size
from .oft import OFTKind, cayley


class BOFTKind(OFTKind):
    """oft_blocks (stages, number, size, size); rescale (out, 1, …) or none."""

    name = "BOFT"
    host_name = "boft"
    ndim = 4

    def claims(self, parts: Parts) -> bool:
        blocks = parts.get("oft_blocks")
        return blocks is not None and blocks.ndim == 4

    def problem(self, parts: Parts) -> tuple[str, str] | None:
        blocks, rescale = parts["oft_blocks"], parts.get("rescale")
        rows = blocks.shape[1] * blocks.shape[2]
        if blocks.shape[-1] % 2 or rows % (2 ** (blocks.shape[0] - 1) * blocks.shape[-1]):
            return f"oft_blocks is {size(blocks)}", "blocks of an even size, and rows that every stage can pair"
        if rescale is not None and (rescale.ndim == 0 or rescale.shape[0] != rows or rescale.numel() != rows):
            return f"rescale is {size(rescale)} for {rows} rows", "one number a row"
        return super().problem(parts)

    def turn(self, parts: Parts, strength: float) -> torch.Tensor:
        rotations = cayley(parts["oft_blocks"], float(parts.get("alpha") or 0))
        _, number, block, _ = rotations.shape
        rows = number * block
        unit = torch.eye(block, dtype=rotations.dtype, device=rotations.device)
        one = torch.eye(rows, dtype=rotations.dtype, device=rotations.device)
        made = one
        for stage, turned in enumerate(rotations):
            apart = 2**stage * block // 2
            # Rows in the order in which this stage takes them block by block.
            order = torch.arange(rows, device=made.device).reshape(-1, 2, apart).transpose(1, 2).flatten()
            mixed = unit + strength * (turned - unit)
            part = torch.einsum("bij,bjn->bin", mixed, made[order].unflatten(0, (number, block))).flatten(0, 1)
            made = torch.empty_like(made).index_copy(0, order, part)
        if parts.get("rescale") is not None:
            made = parts["rescale"].reshape(-1, 1).to(made.dtype) * made
        return strength * (made - one)

    def for_host(self, parts: Parts) -> dict[str, Any]:
        """With an alpha of 0, which means no bound: the host compares it without asking whether there is one."""
        return {"alpha": 0.0} | parts

    def host_leaves_out(self, parts: Parts) -> str:
        return ""
