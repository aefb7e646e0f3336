"""L = (1/n) Σ L_k over all n LoRAs of the merge: a LoRA that lacks the layer counts as zero.

So the whole result, full differences, biases and norms too, is the plain sum over n. A LoRA of strength 0 is no part of
the merge.
"""

from __future__ import annotations

from ...lora.algebra import ThinSVD, concatenate
from ...lora.low_rank import LowRank
from .common import Options


def merge(changes: list[ThinSVD], options: Options) -> tuple[LowRank, float]:
    """Ranks side by side; nothing is approximated."""
    count = options.count or len(changes)
    return concatenate([change.low_rank() for change in changes], [1.0 / count] * len(changes)), 1.0
