"""Ways to merge the changes that several LoRAs make to one weight, each behind `merge(changes, options) -> (LowRank,
energy)`: the merged change, and the share of its squared norm that is left where the method cuts the rank (else 1)."""

from __future__ import annotations

from . import average, dare, np_lora, plain_sum, router, svd, ties, ziplora
from .common import Options

# The names that an artist chooses from.
AVERAGE = "average"
METHODS = {
    "sum": plain_sum.merge,
    AVERAGE: average.merge,
    "SVD": svd.merge,
    "TIES": ties.merge,
    "DARE": dare.merge,
    "ZipLoRA columns": ziplora.merge,
    "NP-LoRA": np_lora.merge,
    "router": router.merge,
}

__all__ = ["AVERAGE", "METHODS", "Options"]
