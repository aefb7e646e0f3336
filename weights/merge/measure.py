"""How a merged change acts on the inputs of each LoRA, whatever method made it."""

from __future__ import annotations

from ..lora.algebra import ThinSVD, thin_svd
from ..lora.low_rank import LowRank


def own_input(merged: LowRank, change: ThinSVD) -> tuple[float, float]:
    """(share of the LoRA that is left, loss) on the LoRA's own inputs P (the projector onto its row space).

    share = ⟨L P, L_k⟩ / ‖L_k‖², loss = ‖(L − L_k) P‖² / ‖L_k‖².
    """
    found = merged.up @ (merged.down @ change.down.T)
    due = change.up * change.values
    size = due.square().sum()
    return float((found * due).sum() / size), float((found - due).square().sum() / size)


def cut(pair: LowRank, max_rank: int, energy: float) -> tuple[LowRank, float]:
    """The best approximation that keeps this share of ‖L‖² and no more than `max_rank` ranks (0: no limit), and the
    share that is kept."""
    if energy >= 1 and (not max_rank or pair.rank <= max_rank):
        return pair, 1.0
    svd = thin_svd(pair.down, pair.up)
    power = svd.values.double().square()
    share = power.cumsum(0) / power.sum()
    k = int((share < energy - 1e-12).sum()) + 1 if energy < 1 else svd.values.numel()
    k = max(1, min(k, svd.values.numel(), max_rank or k))
    root = svd.values[:k].sqrt()
    return LowRank(root[:, None] * svd.down[:k], svd.up[:, :k] * root), float(share[k - 1])
