"""DoRA: any other adapter of the weight and a magnitude, to which the rows (or columns) of the changed weight are
brought: W' = m · (W + ΔW) / ‖W‖. The change depends on the weight, so there is neither a low-rank nor a row form."""

from __future__ import annotations

from typing import Any

from ...row_adapters.terms import Term
from ..low_rank import LowRank
from .base import Kind, NoTerm, Parts, Place, size


class DoRAKind(Kind):
    """dora (out, 1, …) or (1, in, …), beside the parts of another kind.

    Args:
        others: The kinds that it can stand beside.
    """

    name = "DoRA"
    endings = {"dora": r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?"}
    not_merged = "The change that a DoRA makes depends on the weights of the model"
    not_scaled = not_merged

    def __init__(self, others: tuple[Kind, ...]):
        self.others = others

    def other_kind(self, parts: Parts) -> Kind | None:
        """The kind of the adapter that has the magnitude."""
        return next((kind for kind in self.others if kind.claims(parts)), None)

    def own(self, parts: Parts) -> dict[str, Any]:
        other = self.other_kind(parts)
        return super().own(parts) | ({} if other is None else other.own(parts))

    def check(self, parts: Parts, stem: str) -> None:
        super().check(parts, stem)
        other = self.other_kind(parts)
        if other is not None:
            other.check(other.own(parts), stem)

    def problem(self, parts: Parts) -> tuple[str, str] | None:
        if self.other_kind(parts) is None:
            return f"its magnitude {size(parts['dora'])} stands alone", "the adapter that it belongs to"
        return None

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        return self.other_kind(parts).shapes(parts)

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        raise NoTerm("DoRA, which scales the weight itself")
