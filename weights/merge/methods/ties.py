"""TIES (Yadav et al., 2023, arXiv 2306.01708) on the changes of the weights, not on the factors.

Trim each change to its largest entries, elect a sign for each entry by the sum, average the entries of that sign.
The published method trims a whole model at once; here each layer is trimmed alone, so a LoRA keeps the same share of
every layer. The strengths are in the changes already, so they have a say in the election. The result has full rank and
is cut to `options.rank`.
"""

from __future__ import annotations

import torch

from ...lora.algebra import ThinSVD
from ...lora.low_rank import LowRank
from .common import Options, best_factors, dense


def trimmed(matrix: torch.Tensor, density: float) -> torch.Tensor:
    """The matrix with only its `density` largest entries by magnitude."""
    count = round((1 - density) * matrix.numel())
    if count <= 0:
        return matrix
    size = matrix.abs()
    return torch.where(size > size.flatten().kthvalue(count).values, matrix, 0)


def combined(matrices: list[torch.Tensor]) -> torch.Tensor:
    """Mean over those entries that have the elected sign."""
    sign = torch.stack(matrices).sum(0).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for matrix in matrices:
        agrees = (matrix.sign() == sign) & (matrix != 0)
        total += torch.where(agrees, matrix, 0)
        count += agrees
    return total / count.clamp_min(1)


def merge(changes: list[ThinSVD], options: Options) -> tuple[LowRank, float]:
    """Forms the whole matrices of one layer."""
    matrix = combined([trimmed(dense(change), options.density) for change in changes])
    return best_factors(matrix, options.rank, options.generator("ties"))
