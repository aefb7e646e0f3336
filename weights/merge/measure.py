"""How a merged change acts on the inputs of each LoRA, whatever method made it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..lora.algebra import ThinSVD, frobenius_norm
from ..lora.low_rank import LowRank


def own_input(merged: LowRank, change: ThinSVD) -> tuple[float, float]:
    """(share of the LoRA that is left, loss) on the LoRA's own inputs P (the projector onto its row space).

    share = ⟨L P, L_k⟩ / ‖L_k‖², loss = ‖(L − L_k) P‖² / ‖L_k‖².
    """
    found = merged.up @ (merged.down @ change.down.T)
    due = change.up * change.values
    size = due.square().sum()
    return float((found * due).sum() / size), float((found - due).square().sum() / size)


def sum_size(changes: Sequence[ThinSVD]) -> float:
    """‖Σ L_k‖, from the Grams of the factors: the sum is not formed."""
    down = torch.cat([change.down for change in changes])
    up = torch.cat([change.up * change.values for change in changes], 1)
    return frobenius_norm(LowRank(down, up))
