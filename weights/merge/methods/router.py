"""The router: a whole matrix between the ranks instead of a mask, as in SSR-Merge.

L = U M V with the factors of all LoRAs side by side. The best M for Σ_k p_k ‖(L − L_k) X_k‖² is

    M = (Σ p_k E_k H_k) (Σ p_k H_k + ρ I)⁻¹,   H_k = V X_k X_kᵀ Vᵀ

and goes into `up`. From the files alone, X_k X_kᵀ is the projector onto row space k; calibrated, H_k is measured. It
always fits better than masks, and exaggerates by up to 1/(1 − cos²) where inputs are nearly parallel: hence the ridge
ρ, relative to the mean of the diagonal.
"""

from __future__ import annotations

import torch

from ...lora.algebra import ThinSVD
from ...lora.low_rank import LowRank
from .common import Options, stacked


def route(
    grams: list[torch.Tensor], sizes: list[int], ridge: float, weights: list[float] | None = None
) -> torch.Tensor:
    """M (R, R) float64.

    Args:
        grams: H_k (R, R) of each LoRA. sizes: ranks of the blocks. ridge: relative.
    """
    weights = weights or [1.0] * len(grams)
    total = sum(p * h.double() for p, h in zip(weights, grams))
    own = torch.zeros_like(total)
    start = 0
    for p, h, size in zip(weights, grams, sizes):
        own[start : start + size] = p * h.double()[start : start + size]
        start += size
    floor = ridge * total.trace() / len(total)
    return torch.linalg.solve(total + floor * torch.eye(len(total), dtype=total.dtype), own.T).T


def merge(changes: list[ThinSVD], options: Options) -> tuple[LowRank, float]:
    """Rank Σ rank_k; the change itself is not formed."""
    down, up = stacked(changes)
    grams = [(down @ change.down.T) @ (change.down @ down.T) for change in changes]
    matrix = route(grams, [change.values.numel() for change in changes], options.ridge)
    return LowRank(down, up @ matrix.to(up.dtype)), 1.0
