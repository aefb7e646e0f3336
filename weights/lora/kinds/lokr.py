"""LoKr: ΔW = alpha/rank · w1 ⊗ w2, a Kronecker product. Each factor is a matrix or a product of two; w2 may be a
convolution, also in Tucker form. The scale is 1 where neither factor is a product: the host ignores alpha then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...row_adapters.terms import Kronecker, Term
from ..algebra import ThinSVD, thin_svd
from ..low_rank import LowRank
from .base import ALPHA, AddedKind, Parts, Place, columns, multiplied_out, size, tucker, weight_only, wide

_NAMES = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


class LoKrKind(AddedKind):
    """w1 (out1, in1) or w1_a (out1, rank) · w1_b (rank, in1); w2 (out2, in2, *kernel) or w2_a (out2, rank) · w2_b
    (rank, in2·kernel), or with a core t2 (rank, rank, *kernel), w2_a (rank, out2) and w2_b (rank, in2)."""

    name = "LoKr"
    endings = {name: rf"\.{name}" for name in _NAMES} | ALPHA
    host_name = "lokr"
    host_order = ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora")

    def problem(self, parts: Parts) -> tuple[str, str] | None:
        for number in (1, 2):
            name = f"lokr_w{number}"
            lacking = [part for part in (f"{name}_a", f"{name}_b") if parts.get(part) is None]
            if parts.get(name) is None and lacking:
                return f"it has {', '.join(sorted(parts))} and lacks {', '.join(lacking)} of a LoKr", "all of its parts"
            if parts.get(name) is not None and parts[name].ndim < 2:
                return f"{name} is {size(parts[name])}", "a matrix"
            if parts.get(name) is None:
                left, right = parts[f"{name}_a"], parts[f"{name}_b"]
                core = parts.get("lokr_t2") if number == 2 else None
                inner = (left.shape[1], right.shape[0])
                if core is not None:
                    inner = (tuple(core.shape[:2]), (left.shape[0], right.shape[0]))
                if inner[0] != inner[1]:
                    given = f"{name}_a is {size(left)} and {name}_b is {size(right)}"
                    return given + ("" if core is None else f" for a core {size(core)}"), "one rank"
        return None

    def rank(self, parts: Parts) -> int | None:
        """Of the second factor where both are products, as in the host."""
        if parts.get("lokr_w2") is None:
            return parts["lokr_w2_b"].shape[0]
        return parts["lokr_w1_b"].shape[0] if parts.get("lokr_w1") is None else None

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        first, second, core = parts.get("lokr_w1"), parts.get("lokr_w2"), parts.get("lokr_t2")
        left, right = parts.get("lokr_w2_a"), parts.get("lokr_w2_b")
        if first is None:
            rows, across = parts["lokr_w1_a"].shape[0], parts["lokr_w1_b"].shape[1]
        else:
            rows, across = first.shape[0], columns(first)
        if second is not None:
            return [(rows * second.shape[0], across * columns(second))]
        if core is None:
            return [(rows * left.shape[0], across * columns(right))]
        return [(rows * left.shape[1], across * right.shape[1] * columns(core[0]))]

    def kernel(self, parts: Parts) -> tuple[int, ...]:
        for name in ("lokr_w2", "lokr_t2", "lokr_w2_b"):
            if parts.get(name) is not None:
                return tuple(parts[name].shape[2:])
        return ()

    def _first(self, parts: Parts) -> torch.Tensor:
        if parts.get("lokr_w1") is not None:
            return wide(parts["lokr_w1"]).flatten(1)  # see `for_host`
        return wide(parts["lokr_w1_a"]) @ wide(parts["lokr_w1_b"])

    def _second(self, parts: Parts) -> torch.Tensor:
        """(out2, in2·kernel)."""
        if parts.get("lokr_w2") is not None:
            return wide(parts["lokr_w2"]).flatten(1)
        left, right = wide(parts["lokr_w2_a"]), wide(parts["lokr_w2_b"])
        if parts.get("lokr_t2") is None:
            return left @ right.flatten(1)
        return tucker(wide(parts["lokr_t2"]), left, right).flatten(1)

    def change(self, parts: Parts) -> torch.Tensor:
        """The kernel stands behind the channels, so the Kronecker product of flattened factors is the flattened
        product."""
        return torch.kron(self._first(parts), self._second(parts)) * self.scale(parts)

    def low_rank(self, parts: Parts) -> LowRank:
        """The SVD of a Kronecker product is the Kronecker product of the SVDs."""
        if parts.get("lokr_w1") is not None:
            one = _svd_of(self._first(parts))
        else:
            one = thin_svd(wide(parts["lokr_w1_b"]), wide(parts["lokr_w1_a"]))
        if parts.get("lokr_w2") is not None:
            two = _svd_of(self._second(parts))
        else:
            left, right, core = wide(parts["lokr_w2_a"]), wide(parts["lokr_w2_b"]), parts.get("lokr_t2")
            if core is not None:
                left, right = left.T, torch.einsum("ij...,jr->ir...", wide(core), right)
            two = thin_svd(right.flatten(1), left)
        down = torch.kron(one.down, two.down)
        up = torch.kron(one.up * one.values, two.up * (two.values * self.scale(parts)))
        return LowRank(down, up, self.kernel(parts))

    def for_host(self, parts: Parts) -> dict[str, Any]:
        """Two forms multiplied out, their scale in them. With a Tucker core torch.kron stops at the memory layout in
        which the host makes it. Of a convolution over one or three axes the host does not give w1 the axes of the
        kernel: its Kronecker product has the right size, and the channels in the wrong places."""
        core, second = parts.get("lokr_t2"), parts.get("lokr_w2")
        if core is None and (second is None or second.ndim in (2, 4)):
            return dict(parts)
        if core is not None:
            second = tucker(wide(core), wide(parts["lokr_w2_a"]), wide(parts["lokr_w2_b"]))
        second = (wide(second) * self.scale(parts)).contiguous()
        # Not its two factors: alpha would be a scale by their rank.
        first = parts["lokr_w1"] if parts.get("lokr_w1") is not None else self._first(parts)
        if second.ndim in (3, 5):
            first = first.reshape(*first.shape[:2], *[1] * (second.ndim - 2))
        return {"lokr_w1": first, "lokr_w2": second} | {name: parts[name] for name in ("dora",) if name in parts}

    def scaled_by(self, parts: Parts) -> Sequence[str]:
        return ("lokr_w1",)

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        weight_only(self, place)
        if place.layer.kind != "linear" or parts.get("lokr_t2") is not None or place.swap is not None:
            return multiplied_out(self, parts, place)
        first, second = (
            (parts[name],) if parts.get(name) is not None else (parts[f"{name}_a"], parts[f"{name}_b"])
            for name in ("lokr_w1", "lokr_w2")
        )
        return Kronecker(
            place.part_layer(),
            place.source,
            first,
            second,
            self.scale(parts),
            place.outputs(),
            place.inputs(),
            place.dtype,
        )


def _svd_of(matrix: torch.Tensor) -> ThinSVD:
    """Of a matrix, by the way for products: the identity stands on its shorter side."""
    rows, across = matrix.shape
    unit = torch.eye(min(rows, across), dtype=matrix.dtype, device=matrix.device)
    return thin_svd(matrix, unit) if rows < across else thin_svd(unit, matrix)
