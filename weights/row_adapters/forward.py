"""The forward of a layer with terms, and what all such layers of a model have to know during one call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .fused import UnknownCall, fused
from .low_rank import LowRankTerm, Observer
from .regions import Places
from .rows import UnknownRows, spans
from .terms import Term

REPEATED = ".attn2."  # the layers of a UNet's cross-attention, whose rows a patch may repeat


class ModelCall:
    """State of one call of one model: plain numbers, so that a compiled graph can rely on them from call to call.
    While it is not `active`, every layer does just what it did before.

    Attributes:
        order: The branch of each chunk of the batch.
        batch: Rows of the model's input.
        tiled: See `rows.spans`.
        strengths: Branch → one entry for each source of its terms (see `Term`).
        acting: The branches with a term that does something in this call.
        called: Where layers note their names, or None.
        observers: Branch → who notes which layers share an input, or None.
        repeats: Rows of a cross-attention whose rows another node repeats → the branch of each.
        places: How strong the sources with a region are at each place, or None where there are none.
    """

    def __init__(self):
        self.active = False
        self.order: tuple[int, ...] = ()
        self.batch = 0
        self.tiled = False
        self.strengths: dict[int, tuple] = {}
        self.acting: tuple[int, ...] = ()
        self.called: set[str] | None = None
        self.observers: dict[int, Observer] | None = None
        self.repeats: dict[int, tuple[int, ...]] = {}
        self._copies: dict[int, tuple[int, ...]] = {}  # as `repeats`, the row of the batch of each
        self.places: Places | None = None
        self._runs: dict[object, tuple] = {}

    def set_rows(
        self, order: tuple[int, ...], batch: int, tiled: bool, strengths: dict[int, tuple], acting: tuple[int, ...]
    ) -> None:
        """What the next call is made of."""
        self.order, self.batch, self.tiled = order, batch, tiled
        self.strengths, self.acting = strengths, acting
        self.repeats, self._copies = {}, {}
        self._runs.clear()

    def repeat(self, places: tuple[int, ...]) -> None:
        """From now on, in this call: the rows of a cross-attention are copies of these rows of the batch. None: it is
        not known which they are."""
        order = tuple(self.order[place * len(self.order) // self.batch] for place in places)
        known = self.repeats.get(len(order), order)
        if known != order:
            raise UnknownRows(len(order), self.batch)  # two layers, as many rows, and not the same ones
        self.repeats[len(order)] = order
        self._copies[len(order)] = places

    def strengths_on(self, name: str, branch: int, first: int, rows: int, out: torch.Tensor) -> tuple:
        """A branch's strengths on a run of rows of a layer; `out` is the layer's output, or a linear layer's input."""
        if self.places is None:
            return self.strengths[branch]
        copies = self._copies.get(out.shape[0]) if REPEATED in name else None
        return self.places.strengths(name, branch, first, rows, out, self.strengths[branch], copies)

    def runs(self, rows: int, name: str = "") -> tuple:
        """Runs of rows of the acting branches in one layer, worked out once for each number of rows."""
        key = (rows, rows in self.repeats and REPEATED in name)
        found = self._runs.get(key)
        if found is None:
            found = self._runs[key] = self.fresh_runs(rows, name)
        return found

    def fresh_runs(self, rows: int, name: str = "") -> tuple:
        """The same, kept nowhere: for a compiled graph."""
        order, batch = self.order, self.batch
        if rows in self.repeats and REPEATED in name:
            order, batch = self.repeats[rows], rows
        return tuple(run for run in spans(order, batch, rows, self.tiled) if run[0] in self.acting)


def forward_with_terms(name: str, forward: Callable, terms: Mapping[int, list[Term]], call: ModelCall) -> Callable:
    """A layer's forward that also applies each branch's terms to the rows of that branch.

    Args:
        name: Of the layer, for `call.called`.
        terms: Branch → its terms, in the order in which their patches would be merged.

    Raises (from the forward that is returned):
        UnknownRows: see `rows.spans`.
        UnknownCall: something besides the input that `fused` does not know, in a call in which a term acts.
    """

    only = {branch: made[0] for branch, made in terms.items() if len(made) == 1 and isinstance(made[0], LowRankTerm)}
    simple = len(only) == len(terms)

    def acting(rows: int) -> tuple:
        """Runs of rows in which a term acts."""
        return tuple(run for run in call.fresh_runs(rows, name) if run[0] in terms)

    def run(x, *args, **kwargs):
        if not call.active:
            return forward(x, *args, **kwargs)
        parts = None
        if args or kwargs:  # more than the input: where nothing acts, that is the layer's own business
            if call.called is not None and not torch.compiler.is_compiling():
                call.called.add(name)
            if not acting(x.shape[0]):
                return forward(x, *args, **kwargs)
            if args:
                raise UnknownCall(name, f"{len(args)} positional arguments besides the input")
            parts = fused(name, kwargs)
            x = parts.before(x)
        # Nearly every layer of guidance, in every call but the first.
        if simple and call.called is None and not torch.compiler.is_compiling():
            runs = call.runs(x.shape[0], name)
            y = forward(x)
            for branch, start, length in runs:
                term = only.get(branch)
                if term is not None:
                    strengths = call.strengths_on(name, branch, start, length, y)
                    term.add(x, x.narrow(0, start, length), y.narrow(0, start, length), strengths)
            return y if parts is None else parts.after(y)
        watched = call.called is not None and not torch.compiler.is_compiling()
        if watched:
            call.called.add(name)
        runs = acting(x.shape[0])
        if not runs:
            return forward(x)

        # What changes the input does so from the last term to the first: the last was merged last.
        inputs, changed = {}, None
        for branch, start, length in runs:
            rows = x.narrow(0, start, length)
            before, strengths = [], call.strengths[branch]
            if any(term.enters_at_places for term in terms[branch]):
                strengths = call.strengths_on(name, branch, start, length, x)
            for term in reversed(terms[branch]):
                before.append(rows)
                rows = term.enter(rows, strengths)
            inputs[start] = before[::-1]
            if rows is not before[0]:
                changed = x.clone() if changed is None else changed
                changed.narrow(0, start, length).copy_(rows)
        y = forward(x if changed is None else changed)
        if torch.is_grad_enabled():
            y = y.clone()  # terms write into it: what autograd has kept of the layer's own output stays as it was
        for branch, start, length in runs:
            out, strengths = y.narrow(0, start, length), call.strengths_on(name, branch, start, length, y)
            for term, rows in zip(terms[branch], inputs[start], strict=True):
                if isinstance(term, LowRankTerm):
                    if watched and call.observers is not None:
                        call.observers[branch].see(term, x)
                    term.add(x if changed is None else None, rows, out, strengths)
                else:
                    term.leave(rows, out, strengths, forward)
        return y if parts is None else parts.after(y)

    return run


class LayersWithTerms:
    """Puts terms into the layers of a model and takes them out again, as often as wanted.

    Args:
        find: A layer's name → the module.
        terms: A layer's name → branch → terms. Read when they are put in.
        call: Shared by all layers of the model.
    """

    def __init__(self, find: Callable[[str], torch.nn.Module], terms: Mapping[str, Mapping], call: ModelCall):
        self._find, self._terms, self._call = find, terms, call
        self._changed: list[tuple[torch.nn.Module, Callable, Callable | None]] = []

    def put_in(self) -> None:
        for name, terms in self._terms.items():
            module = self._find(name)
            before = module.__dict__.get("forward")
            made = forward_with_terms(name, module.forward, terms, self._call)
            self._changed.append((module, made, before))
            module.forward = made

    def wanted(self) -> dict[torch.nn.Module, Callable[[], bool]]:
        """Each layer → whether it has to be called in the call of the model that is running, instead of being computed
        together with its neighbours: a term may act, or it is noted which layers are called."""
        call = self._call

        def asked(branches):
            return lambda: call.active and (
                call.called is not None or any(each in call.acting and each in call.order for each in branches)
            )

        return {self._find(name): asked(tuple(terms)) for name, terms in self._terms.items()}

    def take_out(self) -> None:
        for module, made, before in self._changed:
            if module.__dict__.get("forward") is not made:
                continue  # what was put in below this one was taken out first, and this one with it
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._changed.clear()
