"""IA3: a factor for each input or output of a layer. The host reads none, so it is known here only to be named."""

from __future__ import annotations

from ...row_adapters.terms import Term
from ..low_rank import LowRank
from .base import Kind, NoTerm, Parts, Place


class IA3Kind(Kind):
    """LyCORIS writes `weight` and `on_input`, PEFT `ia3_l`. `weight` counts only beside `on_input`: every checkpoint
    has keys that end so."""

    name = "IA3"
    endings = {"ia3": r"\.ia3_l(?:\.[^.]+)?(?:\.weight)?", "on_input": r"\.on_input"}
    only_beside = {"weight": ("on_input", ".weight")}
    not_merged = "It multiplies the weights of the model instead of adding to them"
    not_scaled = not_merged

    def own(self, parts: Parts) -> dict:
        return {name: value for name, value in parts.items() if name in self.endings or name in self.only_beside}

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        return []

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        raise NoTerm("an IA3, which ComfyUI does not read")
