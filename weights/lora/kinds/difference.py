"""Changes in full: of a weight (`diff`, for norms `w_norm`), of a bias (`diff_b`, `b_norm`), and a weight put in place
of the model's (`set_weight`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...row_adapters.terms import BiasDifference, Difference, Term
from ..low_rank import LowRank
from .base import Kind, NoTerm, Parts, Place, columns, wide


class FullDifference(Kind):
    """ΔW itself, in the shape of the weight to the letter: the host does not reshape it."""

    name = "difference"
    endings = {"diff": r"\.diff", "w_norm": r"\.w_norm"}
    on_weight = False
    host_name = "diff"
    host_order = ("diff",)

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        change = parts[next(iter(self.own(parts)))]
        return [(change.shape[0], columns(change))] if change.ndim else []

    def exact_shape(self, parts: Parts) -> tuple[int, ...]:
        return tuple(parts[next(iter(self.own(parts)))].shape)

    def change(self, parts: Parts) -> torch.Tensor:
        return sum(wide(change) for change in self.own(parts).values())

    def scaled_by(self, parts: Parts) -> Sequence[str]:
        return tuple(self.own(parts))

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        (change,) = self.own(parts).values()
        if place.swap is not None:
            change = place.swap(change)
        if place.parameter == "bias":
            if place.layer.kind == "norm" and place.layer.axis == -1 and change.ndim > 1:
                raise NoTerm("a norm over several axes")
            return BiasDifference(place.layer, place.source, change, place.outputs(), place.dtype)
        if place.part is not None and place.layer.kind != "linear":
            raise NoTerm("a part of a convolution or norm")
        return Difference(
            place.part_layer(), place.source, change, place.outputs(), place.inputs(), dtype=place.dtype
        )


class BiasChange(FullDifference):
    """Δb, (out,). PEFT writes it as the bias of `lora_B`."""

    endings = {"diff_b": r"\.diff_b|\.lora_(?:up|B)(?:\.[^.]+)?\.bias", "b_norm": r"\.b_norm"}
    host_name = ""  # the host's patch is "diff" here too, on the key of the bias


class SetWeight(Kind):
    """The weight itself, which replaces the model's."""

    name = "set weight"
    endings = {"set_weight": r"\.set_weight"}
    on_weight = False
    host_name = "set"
    host_order = ("set_weight",)
    not_scaled = "It replaces the weight"

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        weight = parts["set_weight"]
        return [(weight.shape[0], columns(weight))] if weight.ndim else []

    def exact_shape(self, parts: Parts) -> tuple[int, ...]:
        return tuple(parts["set_weight"].shape)

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        raise NoTerm(f"a patch that replaces the {place.parameter}")
