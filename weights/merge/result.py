"""What a merge hands on: the merged layers, and the figures of each for the report."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from ..lora.low_rank import LowRank


@dataclass
class LayerReport:
    """Figures of one merged layer.

    Attributes:
        rank: In the merged LoRA.
        kept: Of each LoRA, how much of it is left on its own inputs, ⟨L P_k, L_k⟩ / ‖L_k‖²: 1 is all. None: this LoRA
            has no such layer.
        size, sum_size: ‖L‖ and ‖Σ L_k‖ (Frobenius), of the merged change and of the plain sum.
        energy: The share of ‖L‖² that a limit of the rank has kept.
        loss, loss_sum: Own-input loss of the merged change and of the plain sum (measure.py).
        effective: ZipRank: of each LoRA, the sum of what is left of each direction.
        overlap, chance: ZipRank: mean squared cosine between the inputs of both, and what chance alone would give.
    """

    rank: int
    kept: tuple[float | None, ...]
    size: float
    sum_size: float
    energy: float = 1.0
    loss: float | None = None
    loss_sum: float | None = None
    effective: tuple[float, ...] = ()
    overlap: float | None = None
    chance: float | None = None


@dataclass
class MergedLayers:
    """Low-rank changes by target, a report for each, and lines for the artist."""

    adapters: dict[Hashable, LowRank] = field(default_factory=dict)
    reports: dict[Hashable, LayerReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
