"""NP-LoRA (arXiv 2511.11051): content is kept out of the inputs that style reads.

L = L_s + L_c (I − μ/(1 + μ) V_sᵀ V_s), with the orthonormal rows V_s of the style LoRA. With more than two LoRAs, each
is kept out of the inputs of all that come after it.
"""

from __future__ import annotations

import torch

from ...lora.algebra import ThinSVD
from ...lora.low_rank import LowRank
from .common import Options


def merge(changes: list[ThinSVD], options: Options) -> LowRank:
    """The last of `changes` is the style. Rank Σ rank_k; the change itself is not formed."""
    share = options.mu / (1 + options.mu)
    downs, later = [], None
    for change in reversed(changes):
        down = change.down
        if later is not None:
            down = down - share * (down @ later.T) @ later
        downs.append(down * change.values.sqrt()[:, None])
        rows = change.down if later is None else torch.cat((later, change.down))
        later = change.down if later is None else torch.linalg.qr(rows.T).Q.T
    ups = [change.up * change.values.sqrt() for change in changes]
    return LowRank(torch.cat(downs[::-1]), torch.cat(ups, 1))
