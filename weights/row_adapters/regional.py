"""Terms of which some sources act in a region only: what they add is multiplied by the strength at each place.

A low-rank change of a linear layer is multiplied where it is narrow, y += up · (m ∘ (down · x)): some LoRAs with a
region each cost what they cost without one. Any other is multiplied where it is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..lora.low_rank import LowRank
from .layers import Layer
from .low_rank import LowRankTerm
from .regions import Here, Placed
from .terms import ConvLowRank, InputAndOutput, Term, weights_like


class RegionalLowRank(LowRankTerm):
    """`LowRankTerm` with a strength for each place and source: the columns of down · x are multiplied before `up`, and
    all changes of the same outputs are added in one product.

    Args:
        changes: As for `LowRankTerm`.
    """

    def __init__(self, layer: Layer, changes: list[tuple[LowRank, int]], dtype: torch.dtype | None = None):
        groups: dict[object, list[tuple[LowRank, int]]] = {}
        for change in changes:
            groups.setdefault(change[0].outputs, []).append(change)
        super().__init__(layer, [(_stacked([pair for pair, _ in group]), -1) for group in groups.values()], dtype)
        self.columns = tuple(
            (source, pair.scale, pair.rank) for group in groups.values() for pair, source in group
        )
        self.sources = tuple(source for source, _, _ in self.columns)

    def add(self, whole: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor, strengths: tuple) -> None:
        hidden = self.hidden(whole, x, strengths)
        if hidden is None:
            return
        shares = self._shares(strengths, y)
        if shares is None:
            return
        hidden = (hidden.to(y.dtype) * shares).reshape(-1, hidden.shape[-1])
        flat = y.view(-1, y.shape[-1]) if y.is_contiguous() else y
        for name, start, rank, _, _, part in self.rows:
            up = weights_like(getattr(self, name), y)
            mine = hidden if rank == hidden.shape[1] else hidden.narrow(1, start, rank)
            goal = flat if part is None else flat.narrow(-1, *part)
            if flat is y and y.ndim != 2:
                goal.add_((mine @ up.t()).view(goal.shape))
            else:
                goal.addmm_(mine, up.t())

    def _shares(self, strengths: tuple, y: torch.Tensor) -> torch.Tensor | None:
        """(1 or rows, tokens…, ranks), made once for all layers whose ranks and places are the same."""
        if not isinstance(strengths, Here):
            return self._make_shares(strengths, y)
        if self.columns not in strengths.kept:
            with strengths.keeping():
                strengths.kept[self.columns] = self._make_shares(strengths, y)
        return strengths.kept[self.columns]

    def _make_shares(self, strengths: tuple, y: torch.Tensor) -> torch.Tensor | None:
        if not any(isinstance(strengths[source], Placed) or strengths[source] for source in self.sources):
            return None
        made = []
        for source, scale, rank in self.columns:
            own = strengths[source]
            if isinstance(own, Placed):
                made.append((own.where * (own.strength * scale)).expand(*own.where.shape[:-1], rank))
            else:
                made.append(y.new_full((rank,), own * scale).expand(*(1 for _ in y.shape[1:]), rank))
        sizes = [max(part.shape[axis] for part in made) for axis in range(y.ndim - 1)]
        return torch.cat([part.expand(*sizes, -1) for part in made], -1)


class Regional(Term):
    """Any other term: y becomes y + m ∘ (y' - y), where y' is what the term alone would make of it. A convolution's
    low-rank change is multiplied where it is narrow.

    A term that changes the input does so by the same share at each place, so it has to be one of a linear layer.
    """

    def __init__(self, term: Term):
        super().__init__(term.layer, term.source, term.outputs, term.inputs)
        self.term, self.enters_at_places = term, isinstance(term, InputAndOutput)

    def enter(self, x, strengths):
        own = strengths[self.source]
        if not isinstance(own, Placed):
            return self.term.enter(x, strengths)
        changed = self.term.enter(x, {self.source: own.strength})
        return x if changed is x else x + own.where * (changed - x)

    def leave(self, x: torch.Tensor, y: torch.Tensor, strengths: tuple, base: Callable) -> None:
        own = strengths[self.source]
        if not isinstance(own, Placed):
            self.term.leave(x, y, strengths, base)
            return
        if isinstance(self.term, ConvLowRank):
            self.term.add_at(x, y, own.strength, own.where)
            return
        out = self._outputs_of(y)
        before = out.clone()
        self.term.leave(x, y, {self.source: own.strength}, base)
        out.sub_(before).mul_(own.where).add_(before)


def in_region(term: Term) -> Term | None:
    """The term for an adapter with a region, or None where there is none: a norm's scale would have to know which of
    its input's axes are places, and what GLoRA adds before a convolution is spread by its kernel."""
    if term.layer.kind == "norm" or (isinstance(term, InputAndOutput) and term.layer.kind == "conv"):
        return None
    return Regional(term)


def _stacked(pairs: list[LowRank]) -> LowRank:
    """Changes of the same inputs and outputs side by side, without their scales."""
    if len(pairs) == 1:
        return replace(pairs[0], scale=1.0)
    downs = [pair.down.reshape(pair.rank, -1) for pair in pairs]
    ups = [pair.up.reshape(pair.up.shape[0], -1) for pair in pairs]
    kinds = {tensor.dtype for tensor in (*downs, *ups)}
    common = kinds.pop() if len(kinds) == 1 else torch.float32
    return LowRank(
        torch.cat([down.to(common) for down in downs]),
        torch.cat([up.to(common) for up in ups], 1),
        pairs[0].kernel,
        1.0,
        pairs[0].outputs,
        pairs[0].inputs,
    )
