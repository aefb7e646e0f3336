"""L = Σ L_k: the same as loading the LoRAs one after the other."""

from __future__ import annotations

from ...lora.algebra import ThinSVD, concatenate
from ...lora.low_rank import LowRank
from .common import Options


def merge(changes: list[ThinSVD], options: Options) -> tuple[LowRank, float]:
    """Ranks side by side; nothing is approximated."""
    return concatenate([change.low_rank() for change in changes], [1.0] * len(changes)), 1.0
