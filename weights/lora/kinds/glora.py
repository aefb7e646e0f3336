"""GLoRA: ΔW = alpha/rank · (W A + B), with A and B of low rank. A part of the change depends on the weight.

There are two forms in files: W·a1·a2 + b1·b2, and the first one of LyCORIS, W·a2·a1 + b2·b1. Which one it is shows in
the shapes, and where both would fit in the shape of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...row_adapters.terms import InputAndOutput, Term
from ..low_rank import LowRank
from .base import ALPHA, Kind, NoTerm, Parts, Place, columns, size, weight_only

_NAMES = ("a1", "a2", "b1", "b2")


class GLoRAKind(Kind):
    """a1 (in, rank), a2 (rank, in), b1 (out, rank), b2 (rank, in, *kernel); in the first form a1 and a2, and b1 and b2,
    change places."""

    name = "GLoRA"
    endings = {name: rf"\.{name}\.weight" for name in _NAMES} | ALPHA
    needed = _NAMES
    host_name = "glora"
    host_order = (*_NAMES, "alpha", "dora")
    not_merged = "A part of its change multiplies the weights of the model instead of adding to them"

    def problem(self, parts: Parts) -> tuple[str, str] | None:
        if any(parts[name].ndim < 2 for name in _NAMES) or not any(self._forms(parts)):
            given = ", ".join(f"{name} {size(parts[name])}" for name in _NAMES)
            return f"the parts of a GLoRA do not fit together: {given}", "two products of matrices, of one rank"
        return None

    @staticmethod
    def _forms(parts: Parts) -> tuple[bool, bool]:
        """Whether the shapes fit the newer form, and the first one."""
        a1, a2, b1, b2 = (parts[name].shape for name in _NAMES)
        return b2[0] == b1[1] == a1[1] == a2[0], b2[1] == b1[0] == a1[0] == a2[1]

    def _first_form(self, parts: Parts, shape: Sequence[int]) -> bool:
        newer, first = self._forms(parts)
        return first and (not newer or parts["a2"].shape[0] == shape[0] == shape[1])

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        b1, b2 = parts["b1"], parts["b2"]
        return [(b1.shape[0], columns(b2)), (b2.shape[0], columns(b1))]

    def scaled(self, parts: Parts, strength: float) -> dict[str, torch.Tensor]:
        """By alpha where there is one: without it the rank is not sure."""
        if "alpha" in parts:
            return {"alpha": torch.tensor(float(parts["alpha"]) * strength, dtype=torch.float32)}
        return super().scaled(parts, strength)

    def scaled_by(self, parts: Parts) -> Sequence[str]:
        """One factor of each of the two products."""
        return ("a1", "b1")

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        weight_only(self, place)
        if not place.whole or place.layer.groups > 1:
            raise NoTerm("GLoRA on a part of a layer")
        a1, a2, b1, b2 = (parts[name].flatten(1) for name in _NAMES)
        if self._first_form(parts, place.layer.shape):  # W a2 a1 + b2 b1
            if place.layer.columns() != place.layer.shape[1]:
                raise NoTerm("GLoRA of the first form on a convolution")
            factors = (a1, a2, b1, b2)
        else:  # W a1 a2 + b1 b2
            factors = (a2, a1, b2, b1)
        alpha = parts.get("alpha")
        scale = 1.0 if alpha is None else float(alpha) / factors[0].shape[0]
        return InputAndOutput(place.layer, place.source, *factors, scale, place.dtype)
