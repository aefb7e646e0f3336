"""L = Σ L_k: the same as loading the LoRAs one after the other."""

from __future__ import annotations

from ...lora.algebra import ThinSVD, concatenate
from ...lora.factors import Factors
from .common import Options


def merge(changes: list[ThinSVD], options: Options) -> Factors:
    """Ranks side by side; nothing is approximated."""
    return concatenate([change.pair() for change in changes], [1.0] * len(changes))
