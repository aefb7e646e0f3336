"""The host's adapters as terms: what each kind does to a layer's output, without the layer's weight."""

from __future__ import annotations

import dataclasses

import torch

from ....weights.lora.low_rank import LowRank
from ....weights.row_adapters.layers import Layer
from ....weights.row_adapters.terms import (
    BiasDifference,
    ConvLowRank,
    Difference,
    InputAndOutput,
    Kronecker,
    Term,
    Turn,
)


class NoTerm(Exception):
    """This adapter needs the layer's weight; the message says why."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a patch acts: the layer's key, which of its parameters, which part of it, and from which LoRA.

    `part` is the host's (axis, start, length) or None; `swap` its function over the rows of a change, or None.
    """

    key: str
    parameter: str
    layer: Layer | None
    source: int
    part: tuple[int, int, int] | None = None
    swap: object = None
    dtype: torch.dtype | None = None

    def outputs(self):
        return self.part[1:] if self.part is not None and self.part[0] == 0 else None

    def inputs(self):
        return self.part[1:] if self.part is not None and self.part[0] == 1 else None

    def part_layer(self) -> Layer:
        """The layer, of the size of the part."""
        if self.part is None:
            return self.layer
        shape = list(self.layer.shape)
        shape[self.part[0]] = self.part[2]
        return dataclasses.replace(self.layer, shape=tuple(shape))


def term_of(adapter, place: Place) -> Term | LowRank:
    """A term, or a `LowRank` where the adapter is low-rank on a linear layer, to be stacked with others.

    Raises:
        NoTerm: the change depends on the weight itself (DoRA), replaces it, or the layer is of no known kind.
    """
    layer = place.layer
    if layer is None:
        raise NoTerm("a layer of another kind than linear, convolution or norm")
    if isinstance(adapter, tuple):
        return _plain(adapter, place)
    if layer.kind == "norm" or place.parameter != "weight":
        raise NoTerm(f"a {adapter.name} adapter on a {layer.kind} layer's {place.parameter}")
    kind = _KINDS.get(adapter.name)
    if kind is None:
        raise NoTerm(f"an adapter of the kind {adapter.name}")
    return kind(adapter, place)


def _plain(patch: tuple, place: Place) -> Term:
    kind, values = (patch[0], patch[1]) if len(patch) == 2 else ("diff", patch)
    if kind != "diff" or len(values) > 1:
        raise NoTerm(f"a patch that replaces the {place.parameter}" if kind == "set" else f"a patch of the kind {kind}")
    change = values[0]
    if place.swap is not None:
        change = place.swap(change)
    if place.parameter == "bias":
        if place.layer.kind == "norm" and place.layer.axis == -1 and change.ndim > 1:
            raise NoTerm("a norm over several axes")
        return BiasDifference(place.layer, place.source, change, place.outputs(), place.dtype)
    if place.part is not None and place.layer.kind != "linear":
        raise NoTerm("a part of a convolution or norm")
    return Difference(place.part_layer(), place.source, change, place.outputs(), place.inputs(), dtype=place.dtype)


def _lora(adapter, place: Place) -> Term | LowRank:
    up, down, alpha, mid, dora, reshape = adapter.weights
    _refuse_dora(dora)
    if reshape is not None:
        raise NoTerm("a LoRA that enlarges the layer")
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    layer = place.layer
    up = up.reshape(up.shape[0], -1)
    if place.swap is not None:
        up = place.swap(up)
    if layer.kind == "linear":
        down = down.reshape(down.shape[0], -1)
        if mid is not None:  # a core over one pixel: W = up (mid down)
            down = mid.reshape(mid.shape[0], -1).to(torch.float32) @ down.to(torch.float32)
        return LowRank(down, up, (), scale, place.outputs(), place.inputs())
    if place.part is not None:
        raise NoTerm("a part of a convolution")
    if layer.groups > 1:
        return _merged(adapter, place)
    return ConvLowRank(layer, place.source, down, up, mid, scale, place.dtype)


def _merged(adapter, place: Place) -> Term:
    """A change that the host multiplies out, at every use, since it is far larger than what it is made of."""
    _refuse_dora(adapter.weights[4] if adapter.name == "lora" else adapter.weights[-1])
    layer, key = place.part_layer(), place.key
    if place.part is not None and layer.kind != "linear":
        raise NoTerm("a part of a convolution")
    tensors, rebuild = _taken_apart(adapter)

    def change(held: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        made = rebuild([tensor.to(x.device) for tensor in held]).calculate_weight(
            torch.zeros(layer.shape, device=x.device), key, 1.0, 1.0, None, lambda a: a
        )
        return (made if place.swap is None else place.swap(made)).to(x.dtype)

    return Difference(layer, place.source, change, place.outputs(), place.inputs(), holds=tensors)


def _lokr(adapter, place: Place) -> Term:
    w1, w2, alpha, w1a, w1b, w2a, w2b, t2, dora = adapter.weights
    _refuse_dora(dora)
    if place.layer.kind != "linear" or t2 is not None or place.swap is not None:
        return _merged(adapter, place)
    rank = w2b.shape[0] if w2 is None else w1b.shape[0] if w1 is None else None
    return Kronecker(
        place.part_layer(),
        place.source,
        (w1a, w1b) if w1 is None else (w1,),
        (w2a, w2b) if w2 is None else (w2,),
        alpha / rank if alpha is not None and rank is not None else 1.0,
        place.outputs(),
        place.inputs(),
        place.dtype,
    )


def _glora(adapter, place: Place) -> Term:
    a1, a2, b1, b2, alpha, dora = (
        t.flatten(start_dim=1) if isinstance(t, torch.Tensor) and t.ndim > 1 else t for t in adapter.weights
    )
    _refuse_dora(dora)
    if place.part is not None or place.swap is not None or place.layer.groups > 1:
        raise NoTerm("GLoRA on a part of a layer")
    shape = place.layer.shape
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0] and not (
        old and a2.shape[0] == shape[0] and shape[0] == shape[1]
    ):
        old = False
    if old:  # W a2 a1 + b2 b1
        if place.layer.columns() != shape[1]:
            raise NoTerm("GLoRA of the first form on a convolution")
        rank, factors = a1.shape[0], (a1, a2, b1, b2)
    else:  # W a1 a2 + b1 b2
        rank, factors = a2.shape[0], (a2, a1, b2, b1)
    scale = 1.0 if alpha is None else alpha / rank
    return InputAndOutput(place.layer, place.source, *factors, scale, place.dtype)


def _turn(adapter, place: Place) -> Term:
    _refuse_dora(adapter.weights[-1])
    if place.part is not None or place.swap is not None:
        raise NoTerm(f"{adapter.name} on a part of a layer")
    tensors, rebuild = _taken_apart(adapter)
    size = place.layer.shape[0]
    one = (size, size, *(1 for _ in place.layer.kernel))

    def turn(held: list[torch.Tensor], strength: float, like: torch.Tensor) -> torch.Tensor:
        # The host turns any matrix of as many rows; what it makes of 1 is 1 + L.
        unit = torch.eye(size, device=like.device).reshape(one)
        made = rebuild([tensor.to(like.device) for tensor in held]).calculate_weight(
            unit.clone(), place.key, strength, 1.0, None, lambda a: a
        )
        return (made - unit).reshape(size, size)

    return Turn(place.layer, place.source, turn, holds=tensors)


def _refuse_dora(scale) -> None:
    if scale is not None:
        raise NoTerm("DoRA, which scales the weight itself")


def _taken_apart(adapter):
    """An adapter's tensors, and a function that makes the adapter of them again: on another device, for example.

    An absent alpha becomes the 0 (no constraint) that OFT and BOFT mean by it.
    """
    at = [i for i, weight in enumerate(adapter.weights) if isinstance(weight, torch.Tensor)]

    def rebuild(tensors: list[torch.Tensor]):
        weights = list(adapter.weights)
        for i, tensor in zip(at, tensors, strict=True):
            weights[i] = tensor
        if adapter.name in ("oft", "boft") and weights[2] is None:
            weights[2] = 0.0
        return type(adapter)(adapter.loaded_keys, tuple(weights))

    return [adapter.weights[i] for i in at], rebuild


_KINDS = {"lora": _lora, "loha": _merged, "lokr": _lokr, "glora": _glora, "oft": _turn, "boft": _turn}
