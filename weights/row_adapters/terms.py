"""What an adapter does to a layer's output, without the layer's weight.

A merged weight W' gives W' x + b. Every term makes the difference to W x + b from x, from the output, or by changing x
before the layer sees it. Terms of one layer are applied in the order in which patches would be merged, so that a
rotation also rotates what a LoRA before it added.

Shapes: x (rows, …, in) for a linear layer or (rows, in, …) for a convolution; y the same with out. y is changed in
place. `strengths` holds one entry for each source of the branch: for an adapter of guidance the strength of its LoRA (0
does nothing), for a masked one what is used of its ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from .layers import Layer

Part = tuple[int, int] | None  # (first channel, number of channels), or all of them


def weights_like(tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A weight where the input is, and in its dtype: what a layer computes with."""
    return tensor if tensor.dtype == x.dtype and tensor.device == x.device else tensor.to(x.device, x.dtype)


def stored(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.nn.Parameter | None:
    """A tensor as a module's weight: the same memory, except where the dtype computed in is not the larger one."""
    if tensor is None:
        return None
    if dtype is not None and tensor.is_floating_point() and dtype.itemsize <= tensor.dtype.itemsize:
        tensor = tensor.to(dtype)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        tensor = tensor.clone()  # autograd may not save a tensor that was made in inference mode
    return torch.nn.Parameter(tensor.detach(), requires_grad=False)


class Term(torch.nn.Module, ABC):
    """One adapter on one layer, or on a part of its inputs or outputs.

    Args:
        layer: The layer, or the part of it that the adapter was made for.
        source: The place of its entry in `strengths`.
        outputs: The output channels that it changes.
        inputs: The input channels that it sees.

    Attributes:
        enters_at_places: It changes the input of a linear layer, at each place by the strength there.
    """

    enters_at_places = False

    def __init__(self, layer: Layer, source: int, outputs: Part = None, inputs: Part = None):
        super().__init__()
        self.layer, self.source, self.outputs, self.inputs = layer, source, outputs, inputs
        self._counts: dict[str, int] = {}

    def hold(self, name: str, tensors: Iterable[torch.Tensor], dtype: torch.dtype | None = None) -> None:
        """Hold several tensors as weights of this module itself: the host loads modules without children piece by
        piece, others only whole."""
        self._counts[name] = 0
        for number, tensor in enumerate(tensors):
            self.register_parameter(f"{name}{number}", stored(tensor, dtype))
            self._counts[name] += 1

    def held(self, name: str) -> list[torch.Tensor]:
        return [getattr(self, f"{name}{number}") for number in range(self._counts[name])]

    def enter(self, x: torch.Tensor, strengths: tuple) -> torch.Tensor:
        """The input as the layer, and every term before this one, shall see it."""
        return x

    @abstractmethod
    def leave(self, x: torch.Tensor, y: torch.Tensor, strengths: tuple, base: Callable) -> None:
        """Change the output y in place; x is the input that this term sees, `base` the layer itself."""

    def _inputs_of(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.inputs is None else x.narrow(self.layer.axis, *self.inputs)

    def _outputs_of(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.outputs is None else y.narrow(self.layer.axis, *self.outputs)


class Added(Term):
    """A term that adds something made of the input alone."""

    def leave(self, x, y, strengths, base):
        if strengths[self.source] != 0:
            self._add(self._inputs_of(x), self._outputs_of(y), strengths[self.source])

    @abstractmethod
    def _add(self, x: torch.Tensor, y: torch.Tensor, strength: float) -> None:
        """Add to y, the outputs that it changes, what it makes of x, the inputs that it sees."""


class ConvLowRank(Added):
    """LoRA on a convolution (LoCon): y += strength · scale · up(mid(down(x))).

    Without a core, `lora_down` has the layer's kernel; with one (Tucker form) the core `lora_mid` has it and
    `lora_down` is pointwise. `lora_up` is pointwise. down (rank, in, *kernel), up (out, rank), mid (rank, rank,
    *kernel).
    """

    def __init__(self, layer, source, down, up, mid, scale: float, dtype=None):
        super().__init__(layer, source)
        rank = down.shape[0]
        self.down = stored(down.reshape(rank, -1) if mid is not None else down.reshape(rank, *layer.shape[1:]), dtype)
        self.up = stored(up.reshape(up.shape[0], -1), dtype)
        self.mid = stored(mid if mid is None else mid.reshape(*mid.shape[:2], *layer.kernel), dtype)
        self.scale = scale

    def _add(self, x, y, strength):
        self.add_at(x, y, strength, None)

    def add_at(self, x: torch.Tensor, y: torch.Tensor, strength: float, where: torch.Tensor | None) -> None:
        """Add to y; `where` (1 or rows, 1, *size of y) is the share at each place, or None for all of it."""
        down, up = weights_like(self.down, x), weights_like(self.up, x)
        if self.mid is None:
            hidden = self.layer.convolve(x, down)
        else:
            hidden = self.layer.convolve(self.layer.pointwise(x, down), weights_like(self.mid, x))
        if where is not None:
            hidden = hidden * where
        y.add_(self.layer.pointwise(hidden, up), alpha=strength * self.scale)


class Difference(Added):
    """Any change of the weight that does not depend on the weight: y += strength · layer(x, change).

    `change` is made anew at each call where it is given as a function of the input (LoHa, Tucker LoKr: what they
    multiply out is far larger than they are), else kept.
    """

    def __init__(self, layer, source, change: torch.Tensor | Callable, outputs=None, inputs=None, dtype=None, holds=()):
        super().__init__(layer, source, outputs, inputs)
        self.make = change if callable(change) else None
        self.change = None if callable(change) else stored(change.reshape(layer.shape), dtype)
        self.hold("held", holds)

    def _add(self, x, y, strength):
        change = weights_like(self.change, x) if self.make is None else self.make(self.held("held"), x)
        y.add_(self.layer.apply(x, change), alpha=strength)


class BiasDifference(Added):
    """y += strength · change, along the channels. change (out,)."""

    def __init__(self, layer, source, change: torch.Tensor, outputs=None, dtype=None):
        super().__init__(layer, source, outputs)
        self.change = stored(change, dtype)

    def _add(self, x, y, strength):
        change = weights_like(self.change, y)
        if self.layer.axis == 1:
            change = change.reshape(-1, *(1 for _ in y.shape[2:]))
        y.add_(change, alpha=strength)


class Kronecker(Added):
    """LoKr on a linear layer: the change is w1 ⊗ w2, applied factor by factor.

    (w1 ⊗ w2) x, with x laid out as (in1, in2), is w1 · x · w2ᵀ. w1 (out1, in1), w2 (out2, in2); each may come as
    two factors (a, b), multiplied out at use. The result is scaled by `scale`.
    """

    def __init__(self, layer, source, first: tuple, second: tuple, scale: float, outputs=None, inputs=None, dtype=None):
        super().__init__(layer, source, outputs, inputs)
        self.hold("first", first, dtype)
        self.hold("second", (tensor.reshape(tensor.shape[0], -1) for tensor in second), dtype)
        self.scale = scale

    def _add(self, x, y, strength):
        w1, w2 = (_product([weights_like(w, x) for w in self.held(name)]) for name in ("first", "second"))
        grid = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
        made = torch.matmul(w1, F.linear(grid, w2))
        y.add_(made.flatten(-2), alpha=strength * self.scale)


class InputAndOutput(Added):
    """GLoRA: W' = W + s (W A + B), so W' x = W (x + s A x) + s B x.

    A and B are low-rank: a_up (in, rank) · a_down (rank, in), pointwise over the input channels; b_up (out, rank) ·
    b_down (rank, in, *kernel).
    """

    def __init__(self, layer, source, a_down, a_up, b_down, b_up, scale: float, dtype=None):
        super().__init__(layer, source)
        self.a_down, self.a_up, self.b_up = (stored(t.reshape(t.shape[0], -1), dtype) for t in (a_down, a_up, b_up))
        self.b_down = stored(b_down.reshape(b_down.shape[0], *layer.shape[1:]), dtype)
        self.scale = scale

    def enter(self, x, strengths):
        strength = strengths[self.source]
        if strength == 0:
            return x
        hidden = self.layer.pointwise(x, weights_like(self.a_down, x))
        return torch.add(x, self.layer.pointwise(hidden, weights_like(self.a_up, x)), alpha=strength * self.scale)

    def _add(self, x, y, strength):
        hidden = self.layer.apply(x, weights_like(self.b_down, x))
        y.add_(self.layer.pointwise(hidden, weights_like(self.b_up, x)), alpha=strength * self.scale)


class OutputTransform(Term):
    """Adapters that act on the output side of the weight (OFT, BOFT): W' = W + L W, so y' − b = (1 + L)(y − b).

    `make(held tensors, strength, like)` gives L (out, out). The bias is what the layer makes of zeros: that holds for
    offloaded, patched and custom layers alike.
    """

    def __init__(self, layer, source, make: Callable, outputs=None, holds=()):
        super().__init__(layer, source, outputs)
        self.make = make
        self.hold("held", holds)

    def leave(self, x, y, strengths, base):
        strength = strengths[self.source]
        if strength == 0:
            return
        matrix, out = self.make(self.held("held"), strength, y), self._outputs_of(y)
        free = out
        if self.layer.bias:
            shape = x.shape[-1:] if self.layer.kind == "linear" else x.shape[1:]
            free = out - self._outputs_of(base(x.new_zeros(1, *shape)))
        out.add_(self.layer.pointwise(free, weights_like(matrix, y)))


def _product(factors: list[torch.Tensor]) -> torch.Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]
