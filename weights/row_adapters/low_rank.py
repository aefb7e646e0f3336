"""LoRA on linear layers: the path that nearly every adapter takes, so the one that has to be fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..lora.low_rank import LowRank
from .layers import Layer
from .terms import Term, stored, weights_like


class LowRankTerm(Term):
    """y[outputs] += strength · scale · up · (down · x), for several low-rank changes that see the same input.

    All of them share one product with the stacked `down`: q, k and v of a fused projection, or several LoRAs of one
    branch. Each is then added to its own outputs in one `addmm`, without a copy of the output.

    Args:
        changes: (low-rank change, the place of its LoRA's strength), all with the same `inputs`.
    """

    def __init__(self, layer: Layer, changes: list[tuple[LowRank, int]], dtype: torch.dtype | None = None):
        pairs = [pair for pair, _ in changes]
        super().__init__(layer, -1, None, pairs[0].inputs)
        downs = [pair.down.reshape(pair.down.shape[0], -1) for pair in pairs]
        common = downs[0].dtype if len({down.dtype for down in downs}) == 1 else torch.float32
        self.down = stored(downs[0] if len(downs) == 1 else torch.cat([down.to(common) for down in downs]), dtype)
        self.hold("up", (pair.up.reshape(pair.up.shape[0], -1) for pair in pairs), dtype)
        self.scales = tuple(pair.scale for pair in pairs)
        self.sources = tuple(source for _, source in changes)
        self.parts = tuple(pair.outputs for pair in pairs)
        self.ranks = tuple(down.shape[0] for down in downs)
        self.shared: SharedInput | None = None
        starts = (sum(self.ranks[:place]) for place in range(len(pairs)))
        names = (f"up{place}" for place in range(len(pairs)))
        self.rows = tuple(zip(names, starts, self.ranks, self.scales, self.sources, self.parts, strict=True))

    def leave(self, x: torch.Tensor, y: torch.Tensor, strengths, base: Callable) -> None:
        self.add(None, x, y, strengths)

    def hidden(self, whole: torch.Tensor | None, x: torch.Tensor, strengths: tuple) -> torch.Tensor | None:
        """down · x (rows, …, ranks), from the product for all layers with this input where there is one; None where
        no source has a strength."""
        if self.shared is not None and whole is not None and not torch.compiler.is_compiling():
            found = self.shared.hidden(self, whole, x)
            if found is not None:
                return found
        if not any(strengths[source] for source in self.sources):
            return None
        return F.linear(self._inputs_of(x), weights_like(self.down, x))

    def add(self, whole: torch.Tensor | None, x: torch.Tensor, y: torch.Tensor, strengths: tuple[float, ...]) -> None:
        """`leave`, where x may be rows of `whole`, the object that other layers of a `SharedInput` get too."""
        hidden = self.hidden(whole, x, strengths)
        if hidden is None:
            return
        if hidden.dtype != y.dtype:
            hidden = hidden.to(y.dtype)
        if hidden.ndim != 2:
            hidden = hidden.reshape(-1, hidden.shape[-1])
        flat = y.view(-1, y.shape[-1]) if y.is_contiguous() else y
        for name, start, rank, scale, source, part in self.rows:
            strength = strengths[source] * scale
            if strength == 0:
                continue
            up = weights_like(getattr(self, name), y)
            mine = hidden if rank == hidden.shape[1] else hidden.narrow(1, start, rank)
            goal = flat if part is None else flat.narrow(-1, *part)
            if flat is y and y.ndim != 2:
                goal.add_(F.linear(mine, up).view(goal.shape), alpha=strength)
            else:
                goal.addmm_(mine, up.t(), alpha=strength)


class SharedInput:
    """Layers that get one and the same tensor (q, k, v of a block): their `down`s stacked into one product.

    The layer that is called first computes for all; the others find their columns there. The result is let go with the
    last of them.
    """

    def __init__(self, members: list[LowRankTerm]):
        self._members = members
        self._place = {id(member): place for place, member in enumerate(members)}
        self._stacked = torch.cat([member.down for member in members])
        self._x = self._rows = self._hidden = None
        self._columns = []
        start = 0
        for member in members:
            end = start + member.down.shape[0]
            self._columns.append((start, end))
            member.down.data = self._stacked[start:end]  # one memory for both
            member.shared = self
            start = end

    def hidden(self, member: LowRankTerm, whole: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """down · x for one member, or None where it has to be computed for it alone."""
        place = self._place[id(member)]
        rows = (x.storage_offset(), x.shape)
        if place == 0:
            self._x, self._rows = whole, rows
            self._hidden = F.linear(x, weights_like(self._stacked, x))
        elif self._x is not whole or self._rows != rows:
            return None
        start, end = self._columns[place]
        found = self._hidden[..., start:end]
        if place == len(self._members) - 1:
            self.let_go()
        return found

    def let_go(self) -> None:
        self._x = self._rows = self._hidden = None

    def undo(self) -> None:
        """The members compute alone again."""
        self.let_go()
        for member in self._members:
            member.shared = None
        self._stacked = None  # the memory stays, as the members' own


class Observer:
    """Watches one pass of the model: which low-rank layers got the same tensor one after the other."""

    def __init__(self):
        self._last: torch.Tensor | None = None
        self._groups: list[list[LowRankTerm]] = []

    def see(self, member: LowRankTerm, whole: torch.Tensor) -> None:
        if self._groups and whole is self._last and member not in self._groups[-1]:
            self._groups[-1].append(member)
        else:
            self._groups.append([member])
        self._last = whole

    def groups(self) -> list[SharedInput]:
        """Groups of two and more; a layer that was called twice is in none, its callers may differ."""
        self._last = None
        calls = Counter(id(member) for group in self._groups for member in group)
        return [
            SharedInput(group)
            for group in self._groups
            if len(group) > 1
            and all(calls[id(member)] == 1 and member.inputs is None for member in group)
            and len({(member.down.dtype, member.down.device) for member in group}) == 1
        ]
