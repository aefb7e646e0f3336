"""The sum, cut to the largest rank that one of the LoRAs has: the best approximation of that rank."""

from __future__ import annotations

from ...lora.algebra import ThinSVD, truncate
from ...lora.low_rank import LowRank
from . import plain_sum
from .common import Options


def merge(changes: list[ThinSVD], options: Options) -> LowRank:
    """By QR and the SVD of a small matrix; the change itself is not formed."""
    return truncate(plain_sum.merge(changes, options), max(change.values.numel() for change in changes))
