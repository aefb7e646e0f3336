"""NP-LoRA (arXiv 2511.11051): content is kept out of the inputs that style reads.

L = L_s + L_c (I − μ/(1 + μ) V_sᵀ V_s), with the orthonormal rows V_s of the style LoRA. The paper has one content and
one style. Our own extension to more LoRAs: each is kept out of the inputs of all that come after it, with an
orthonormal basis of the space that their rows span.
"""

from __future__ import annotations

import torch

from ...lora.algebra import ThinSVD
from ...lora.low_rank import LowRank
from .common import Options


_SAME = 1e-5  # singular values of stacked orthonormal rows below this are directions that the others have already


def _span(rows: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of rows that may depend on each other."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > _SAME * values[0]]


def merge(changes: list[ThinSVD], options: Options) -> tuple[LowRank, float]:
    """The last of `changes` is the style. Rank Σ rank_k; the change itself is not formed."""
    share = options.mu / (1 + options.mu)
    downs, later = [], None
    for change in reversed(changes):
        down = change.down
        if later is not None:
            down = down - share * (down @ later.T) @ later
        downs.append(down * change.values.sqrt()[:, None])
        later = change.down if later is None else _span(torch.cat((later, change.down)))
    ups = [change.up * change.values.sqrt() for change in changes]
    return LowRank(torch.cat(downs[::-1]), torch.cat(ups, 1)), 1.0
