"""ZipLoRA's column masks (Shah et al., 2023, arXiv 2311.13600), found without training.

One mask value for each input column of each LoRA: L = Σ_k L_k diag(m_k). ZipLoRA trains the masks through the model;
here the same objective, Σ_k ‖(L − L_k) X_k‖² with the projector onto each LoRA's row space for X_k X_kᵀ, is solved by
conjugate gradients, which need only products of thin matrices:

    Q m = Σ_k diag-part(Lᵀ (L diag(m)) P_k),  right side Σ_k diag-part(Lᵀ L_k P_k)

The masks start at 1, where training starts too, and columns that the objective does not see stay there. The term that
ZipLoRA adds against masks that overlap (λ = 0.01) is left out: it is small beside the errors.
"""

from __future__ import annotations

import torch

from ...lora.algebra import ThinSVD
from ...lora.low_rank import LowRank
from .common import Options

_ROUNDS, _ENOUGH = 100, 1e-4


def column_masks(changes: list[ThinSVD]) -> torch.Tensor:
    """(LoRAs, in): the masks."""
    ups = [change.up * change.values for change in changes]
    downs = [change.down for change in changes]
    grams = [[a.T @ b for b in ups] for a in ups]

    def product(masks: torch.Tensor) -> torch.Tensor:
        """Q masks."""
        seen = torch.zeros_like(masks)
        for basis in downs:
            inner = [(down * mask) @ basis.T for down, mask in zip(downs, masks)]  # (r_j, r_k)
            for i, row in enumerate(grams):
                left = sum(gram @ part for gram, part in zip(row, inner))  # u_iᵀ L diag(m) V_kᵀ
                seen[i] += (downs[i] * (left @ basis)).sum(0)
        return seen

    right = torch.zeros(len(changes), downs[0].shape[1], dtype=downs[0].dtype)
    for k, basis in enumerate(downs):
        for i in range(len(changes)):
            right[i] += (downs[i] * (grams[i][k] @ basis)).sum(0)
    masks = torch.ones_like(right)
    residual = right - product(masks)
    direction, size, first = residual.clone(), residual.square().sum(), right.square().sum()
    for _ in range(_ROUNDS):
        if float(size) <= _ENOUGH**2 * float(first):
            break
        ahead = product(direction)
        curvature = (direction * ahead).sum()
        if float(curvature) <= 0:
            break
        step = size / curvature
        masks = masks + step * direction
        residual = residual - step * ahead
        new = residual.square().sum()
        direction, size = residual + (new / size) * direction, new
    return masks


def merge(changes: list[ThinSVD], options: Options) -> LowRank:
    """Rank Σ rank_k; the change itself is not formed."""
    masks = column_masks(changes)
    roots = [change.values.sqrt() for change in changes]
    down = torch.cat([root[:, None] * change.down * mask for root, change, mask in zip(roots, changes, masks)])
    return LowRank(down, torch.cat([change.up * root for root, change in zip(roots, changes)], 1))
