"""L = (1/n) Σ L_k over all n LoRAs of the merge, those that lack the layer counting as zero."""

from __future__ import annotations

from ...lora.algebra import ThinSVD, concatenate
from ...lora.low_rank import LowRank
from .common import Options


def merge(changes: list[ThinSVD], options: Options) -> LowRank:
    """Ranks side by side; nothing is approximated."""
    return concatenate([change.low_rank() for change in changes], [1.0 / len(changes)] * len(changes))
