"""ZipLoRA's column masks (Shah et al., 2023, arXiv 2311.13600), found without training.

One mask value for each input column of each LoRA: L = Σ_k L_k diag(m_k). ZipLoRA trains the masks through the model;
here the same objective, Σ_k ‖(L − L_k) X_k‖² with the projector onto each LoRA's row space for X_k X_kᵀ, is solved to
its optimum. It is ½ mᵀ Q m − gᵀ m but for a factor and a constant, with products of thin matrices only:

    Q m = Σ_k diag-part(Lᵀ (L diag(m)) P_k),  g = Σ_k diag-part(Lᵀ L_k P_k)

Masks lie in [0, 2]. Trained masks never leave that range, as a few small steps from 1 cannot; without it, two LoRAs
that read the same inputs get masks of opposite signs that cancel there and are many times the plain sum everywhere
else. The masks start at 1, where training starts too, and columns that the objective does not see stay there. The
term that ZipLoRA adds against masks that overlap (λ = 0.01) is left out: it is small beside the errors.
"""

from __future__ import annotations

import torch

from ...lora.algebra import ThinSVD
from ...lora.low_rank import LowRank
from ..box_qp import minimise_in_box
from .common import Options

LOWEST, HIGHEST = 0.0, 2.0
_ENOUGH = 1e-3  # of Σ ‖L_k‖²: how far the sum of the own-input losses may be above its minimum


def column_masks(changes: list[ThinSVD]) -> torch.Tensor:
    """(LoRAs, in): the masks, in [0, 2]."""
    ups = [change.up * change.values for change in changes]
    downs = [change.down for change in changes]
    grams = [[a.T @ b for b in ups] for a in ups]
    inputs = downs[0].shape[1]

    def product(masks: torch.Tensor) -> torch.Tensor:
        """Q masks."""
        masks = masks.view(len(downs), inputs)
        seen = torch.zeros_like(masks)
        for basis in downs:
            inner = [(down * mask) @ basis.T for down, mask in zip(downs, masks)]  # (r_j, r_k)
            for i, row in enumerate(grams):
                left = sum(gram @ part for gram, part in zip(row, inner))  # u_iᵀ L diag(m) V_kᵀ
                seen[i] += (downs[i] * (left @ basis)).sum(0)
        return seen.flatten()

    right = torch.zeros(len(changes), inputs, dtype=downs[0].dtype)
    for k, basis in enumerate(downs):
        for i in range(len(changes)):
            right[i] += (downs[i] * (grams[i][k] @ basis)).sum(0)
    read = sum(basis.square().sum(0) for basis in downs)
    diagonal = torch.cat([(change.values[:, None] * change.down).square().sum(0) * read for change in changes])
    enough = 0.5 * _ENOUGH * float(sum(change.values.square().sum() for change in changes))
    masks = minimise_in_box(product, right.flatten(), diagonal, torch.ones_like(diagonal), LOWEST, HIGHEST, enough)
    return masks.view(len(changes), inputs)


def merge(changes: list[ThinSVD], options: Options) -> tuple[LowRank, float]:
    """Rank Σ rank_k; the change itself is not formed."""
    masks = column_masks(changes)
    roots = [change.values.sqrt() for change in changes]
    down = torch.cat([root[:, None] * change.down * mask for root, change, mask in zip(roots, changes, masks)])
    return LowRank(down, torch.cat([change.up * root for root, change in zip(roots, changes)], 1)), 1.0
