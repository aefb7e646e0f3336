"""DARE (Yu et al., 2024, arXiv 2311.03099) on the changes of the weights, not on the factors.

Drop each entry with the probability 1 − density, raise the rest by 1/density, add up. The result has full rank and is
cut to `options.rank`.
"""

from __future__ import annotations

import torch

from ...lora.algebra import ThinSVD
from ...lora.low_rank import LowRank
from .common import Options, best_factors, dense


def merge(changes: list[ThinSVD], options: Options) -> tuple[LowRank, float]:
    """Forms the whole matrices of one layer. Random by `options.seed`."""
    total = None
    for index, change in enumerate(changes):
        matrix = dense(change)
        kept = torch.rand(matrix.shape, generator=options.generator(f"dare {index}")) < options.density
        part = torch.where(kept, matrix / options.density, 0)
        total = part if total is None else total + part
    return best_factors(total, options.rank, options.generator("dare"))
