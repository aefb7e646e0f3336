"""Two LoRAs of one layer with a mask over their ranks: what a merge of content and style does to a layer's output.

The ranks of both are stacked, content's first. A row of the batch gets content's ranks alone, style's alone, or all of
them times a mask, through which a gradient may flow. The weight is never needed, so the model may be quantised or
offloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..lora.low_rank import LowRank
from .layers import Layer
from .terms import Term, stored, weights_like

CONTENT, STYLE, MERGED = 0, 1, 2  # the branches of a merge

Ranks = tuple[int, int] | torch.Tensor  # (first rank, number of ranks), each at 1; or a mask (rank,)


class MaskedLowRank(Term):
    """y[outputs] += up · (mask ∘ (down · x[inputs])), on a linear layer or a convolution.

    In the place of a strength stands what is used of the ranks: `Ranks`. A mask may need a gradient; `down` and `up`
    never do. On a convolution `down` takes the kernel, stride, padding and dilation of the layer, and `up` is
    pointwise.

    Args:
        layer: The whole layer.
        source: The place of this layer's `Ranks` among the strengths of a branch.
        change: Both LoRAs' ranks; its `outputs` and `inputs` say which part of the layer it is for, its kernel is not
            asked.

    Attributes:
        watch: None, or a function that is given down · x (tokens, rank) at each call; it sees nothing of a grouped
            convolution, where that product is not one tensor.
    """

    def __init__(self, layer: Layer, source: int, change: LowRank, dtype: torch.dtype | None = None):
        super().__init__(layer, source, change.outputs, change.inputs)
        self.down = stored(change.down.reshape(change.rank, -1), dtype)
        self.up = stored(change.up if change.scale == 1 else change.up * change.scale, dtype)
        self.watch: Callable[[torch.Tensor], None] | None = None

    def leave(self, x: torch.Tensor, y: torch.Tensor, strengths: tuple[Ranks, ...], base: Callable) -> None:
        ranks, x, y = strengths[self.source], self._inputs_of(x), self._outputs_of(y)
        if self.layer.groups > 1:
            self._add_multiplied_out(x, y, ranks)
            return
        down, up, axis = weights_like(self.down, x), weights_like(self.up, x), self.layer.axis
        some = None if isinstance(ranks, torch.Tensor) else ranks
        if self.watch is not None:
            hidden = self._down(x, down)
            self.watch(hidden.movedim(axis, -1).reshape(-1, hidden.shape[axis]))
            hidden = hidden if some is None else hidden.narrow(axis, *some)
        elif some is None or some[1]:
            hidden = self._down(x, down if some is None else down.narrow(0, *some))
        if some is None:
            mask = ranks.to(x.device)
            shape = (-1, *(1 for _ in hidden.shape[2:])) if axis == 1 else (-1,)
            hidden = (hidden * mask.view(shape)).to(hidden.dtype)
        elif not some[1]:
            return
        else:
            up = up.narrow(1, *some)
        y.add_(self.layer.pointwise(hidden, up))

    def _down(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        if self.layer.kind == "linear":
            return F.linear(x, down)
        return self.layer.convolve(x, down.reshape(down.shape[0], -1, *self.layer.kernel))

    def _add_multiplied_out(self, x: torch.Tensor, y: torch.Tensor, ranks: Ranks) -> None:
        """A grouped convolution: its factors are no convolutions of their own."""
        if isinstance(ranks, torch.Tensor):
            mask = ranks.to(self.up)
        else:
            mask = self.up.new_zeros(self.up.shape[1])
            mask[ranks[0] : sum(ranks)] = 1
        change = (self.up * mask) @ self.down
        y.add_(self.layer.apply(x, weights_like(change.reshape(self.layer.shape), x)))
