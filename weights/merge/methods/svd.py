"""The sum, cut to the largest rank that one of the LoRAs has: the best approximation of that rank."""

from __future__ import annotations

from ...lora.algebra import ThinSVD, cut
from ...lora.low_rank import LowRank
from . import plain_sum
from .common import Options


def merge(changes: list[ThinSVD], options: Options) -> tuple[LowRank, float]:
    """By QR and the SVD of a small matrix; the change itself is not formed."""
    return cut(plain_sum.merge(changes, options)[0], max(change.values.numel() for change in changes))
