"""What every kind of adapter says of itself. One file a kind; the table of them is in `__init__`.

Parts are the tensors of one adapter by short names: `down`, `up`, `alpha`, `hada_w1_a`, … They come from a LoRA file
(`keys.group_keys`) or from an adapter that the host has already read (`Kind.host_order`); in the second case `alpha` is
a number and `reshape_weight` a list.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...errors import StyleLoomError
from ...row_adapters.layers import Layer
from ...row_adapters.terms import Difference, Term
from ..low_rank import LowRank

Parts = Mapping[str, Any]
ALPHA = {"alpha": r"\.alpha"}


class NoTerm(Exception):
    """This adapter needs the layer's weight, so it has no row form; the message says why."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an adapter acts: the layer's key, which of its parameters, which part of it, and from which LoRA.

    `part` is (axis, start, length) of the weight, or None for all of it; `swap` is a function over the rows of a
    change, or None (the host swaps the halves of a final modulation).
    """

    key: str
    parameter: str
    layer: Layer | None
    source: int
    part: tuple[int, int, int] | None = None
    swap: Callable[[torch.Tensor], torch.Tensor] | None = None
    dtype: torch.dtype | None = None

    def outputs(self) -> tuple[int, int] | None:
        return self.part[1:] if self.part is not None and self.part[0] == 0 else None

    def inputs(self) -> tuple[int, int] | None:
        return self.part[1:] if self.part is not None and self.part[0] == 1 else None

    def part_layer(self) -> Layer:
        """The layer, of the size of the part."""
        if self.part is None:
            return self.layer
        shape = list(self.layer.shape)
        shape[self.part[0]] = self.part[2]
        return dataclasses.replace(self.layer, shape=tuple(shape))

    @property
    def whole(self) -> bool:
        """All of the layer, rows in the order of the file."""
        return self.part is None and self.swap is None


def damaged(stem: str, found: str, expected: str) -> StyleLoomError:
    """The error for parts that are missing or do not fit together."""
    return StyleLoomError(f"{stem}: {found}", expected, "The LoRA file is damaged: export it again.")


def size(tensor: torch.Tensor) -> str:
    """A shape as messages show it."""
    return str(list(tensor.shape))


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where it is: what changes are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tucker(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σᵢⱼ left[i, p] · core[i, j, …] · right[j, r]: a convolution's weight (p, r, …) from its Tucker form, as LyCORIS
    writes it in LoHa and LoKr. core (i, j, *kernel), left (i, p), right (j, r)."""
    return torch.einsum("ij...,ip,jr->pr...", core, left, right)


class Kind(ABC):
    """A kind of adapter: its keys, what its parts must be, the change that it makes, and what can be done with it.

    Attributes:
        name: What reports and messages call it.
        endings: Part → regular expression for what its keys end in; the rest of a key is the layer's name.
        needed: Parts that must be there. Kinds with alternatives say more in `problem`.
        on_weight: It is an adapter of the weight: a layer has at most one of these kinds in a file.
        host_name: The name of the host's adapter, or the first member of its patch tuple ("diff", "set").
        host_order: The parts as they stand in `adapter.weights`, or in the second member of the patch tuple.
        not_merged: Why it cannot be merged as a LoRA; '' for `AddedKind` and for full differences.
        not_scaled: Why a strength cannot be put into its file; '' where it can.
    """

    name: str
    endings: Mapping[str, str]
    needed: Sequence[str] = ()
    on_weight = True
    host_name = ""
    host_order: Sequence[str] = ()
    not_merged = ""
    not_scaled = ""

    # --- the parts

    def claims(self, parts: Parts) -> bool:
        """Whether these are parts of this kind; an alpha alone is of none."""
        return any(name in self.endings for name in parts if name != "alpha")

    def own(self, parts: Parts) -> dict[str, Any]:
        """Those of the parts that are of this kind."""
        return {name: value for name, value in parts.items() if name in self.endings}

    def check(self, parts: Parts, stem: str) -> None:
        """Raise StyleLoomError where parts are missing or do not fit together; `stem` is for the message."""
        lacking = [name for name in self.needed if name not in parts]
        if lacking:
            given = ", ".join(sorted(parts))
            raise damaged(stem, f"it has {given} and lacks {', '.join(lacking)} of a {self.name}", "all of its parts")
        alpha = parts.get("alpha")
        if isinstance(alpha, torch.Tensor) and alpha.numel() != 1:
            raise damaged(stem, f"alpha is {size(alpha)}", "one number")
        found = self.problem(parts)
        if found:
            raise damaged(stem, *found)

    def problem(self, parts: Parts) -> tuple[str, str] | None:
        """(what does not fit together, what would), or None."""
        return None

    def rank(self, parts: Parts) -> int | None:
        """What the host divides alpha by; None where alpha is not a scale."""
        return None

    def scale(self, parts: Parts) -> float:
        """alpha / rank; 1 without an alpha, or where alpha is not a scale."""
        rank = self.rank(parts)
        return float(parts["alpha"]) / rank if rank and parts.get("alpha") is not None else 1.0

    # --- the change of the weight

    @abstractmethod
    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        """(rows, columns) of the change, flattened behind its first axis: every form that the parts can be read in.
        None for columns: any number. Empty where the kind does not fix the shape."""

    def exact_shape(self, parts: Parts) -> tuple[int, ...] | None:
        """The shape that the weight must have to the letter, where the host does not reshape; else None."""
        return None

    def kernel(self, parts: Parts) -> tuple[int, ...]:
        """What the parts say of a convolution's kernel; () where they are matrices."""
        return ()

    # --- a strength in the file

    def scaled(self, parts: Parts, strength: float) -> dict[str, torch.Tensor]:
        """The parts that change when the adapter shall do `strength` times as much. By alpha where that is its scale:
        the tensors stay as they are, and the host multiplies in float32."""
        rank = self.rank(parts)
        if rank is None:
            return {name: scaled_tensor(parts[name], strength) for name in self.scaled_by(parts)}
        alpha = float(parts["alpha"]) if "alpha" in parts else float(rank)
        return {"alpha": torch.tensor(alpha * strength, dtype=torch.float32)}

    def scaled_by(self, parts: Parts) -> Sequence[str]:
        """Without an alpha that scales: the parts to multiply."""
        return ()

    # --- on rows of a batch

    @abstractmethod
    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        """What it does to a layer's output, without the layer's weight. `LowRank` on linear layers is stacked with
        others by the caller.

        Raises:
            NoTerm: It cannot be said without the weight.
        """

    def for_host(self, parts: Parts) -> dict[str, Any]:
        """The parts as the host's merge can work with them, where it would stop at those in the file: it logs an error
        then, and goes on without the adapter."""
        return dict(parts)

    def host_leaves_out(self, parts: Parts) -> str:
        """What the host's merge of this adapter does not take into account, in words; '' where nothing."""
        return ""


class AddedKind(Kind):
    """A kind whose change of the weight is of low rank and does not depend on the weight: it can be merged."""

    @abstractmethod
    def change(self, parts: Parts) -> torch.Tensor:
        """The change of the weight at strength 1, (out, …), in float32 or better."""

    @abstractmethod
    def low_rank(self, parts: Parts) -> LowRank:
        """The change as a product, exactly and without forming it."""


def scaled_tensor(tensor: torch.Tensor, strength: float) -> torch.Tensor:
    """Multiplied in float32 or better, with one rounding to its dtype."""
    return (wide(tensor) * strength).to(tensor.dtype)


def weight_only(kind: Kind, place: Place) -> None:
    """Raise NoTerm where a layer's bias or a norm is to be changed by an adapter that is for weights of matrices."""
    if place.layer.kind == "norm" or place.parameter != "weight":
        raise NoTerm(f"a {kind.name} adapter on a {place.layer.kind} layer's {place.parameter}")


def multiplied_out(kind: AddedKind, parts: Parts, place: Place) -> Difference:
    """The row form of a change that is multiplied out at every use, since it is far larger than its parts."""
    layer = place.part_layer()
    if place.part is not None and layer.kind != "linear":
        raise NoTerm("a part of a convolution")
    names = [name for name, value in parts.items() if isinstance(value, torch.Tensor)]
    numbers = {name: value for name, value in parts.items() if name not in names}

    def change(held: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        there = {name: wide(tensor.to(x.device)) for name, tensor in zip(names, held, strict=True)}
        made = kind.change(numbers | there).reshape(layer.shape)
        return (made if place.swap is None else place.swap(made)).to(x.dtype)

    held = [parts[name] for name in names]
    return Difference(layer, place.source, change, place.outputs(), place.inputs(), holds=held)


def columns(tensor: torch.Tensor) -> int:
    """How many columns it has when it is flattened behind its first axis."""
    return math.prod(tensor.shape[1:])
