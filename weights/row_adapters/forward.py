"""The forward of a layer with terms, and what all such layers of a model have to know during one call of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping

import torch

from .fused import UnknownCall, fused
from .low_rank import LowRankTerm, Observer
from .layouts import Layouts, Split
from .regions import Places
from .rows import BATCH, ONE_FOR_ALL, UnknownRows, spans
from .terms import Term

REPEATED = ".attn2."  # the layers of a UNet's cross-attention, whose rows a patch may repeat


class ModelCall:
    """State of one call of one model: plain numbers, so that a compiled graph can rely on them from call to call.
    While it is not `active`, every layer does just what it did before.

    Attributes:
        order: The branch of each chunk of the batch.
        batch: Rows of the model's input.
        layouts: How they are arranged in the layers of this model.
        strengths: Branch -> one entry for each source of its terms (see `Term`).
        acting: The branches with a term that does something in this call.
        called: Where layers note their names, or None.
        observers: Branch -> who notes which layers share an input, or None.
        repeats: Rows of a cross-attention whose rows another node repeats -> the branch of each.
        seen: Told of every layer's name and input before it runs, or None.
        places: How strong the sources with a region are at each place, or None where there are none.
    """

    def __init__(self, layouts: Layouts | None = None):
        self.active = False
        self.order: tuple[int, ...] = ()
        self.batch = 0
        self.layouts = layouts or Layouts()
        self.strengths: dict[int, tuple] = {}
        self.acting: tuple[int, ...] = ()
        self.called: set[str] | None = None
        self.observers: dict[int, Observer] | None = None
        self.repeats: dict[int, tuple[int, ...]] = {}
        self.seen: Callable[[str, torch.Tensor], None] | None = None
        self._copies: dict[int, tuple[int, ...]] = {}  # as `repeats`, the row of the batch of each
        self.places: Places | None = None
        self._runs: dict[object, tuple] = {}

    def set_rows(
        self, order: tuple[int, ...], batch: int, strengths: dict[int, tuple], acting: tuple[int, ...]
    ) -> None:
        """What the next call is made of."""
        if (order, batch, acting) != (self.order, self.batch, self.acting) or self.repeats:
            self.forget()
        self.order, self.batch = order, batch
        self.strengths, self.acting = strengths, acting

    def forget(self) -> None:
        """Have the rows of all layers worked out anew."""
        self._runs = {}
        self.repeats, self._copies = {}, {}

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

    @contextlib.contextmanager
    def only(self, branch: int, batch: int):
        """While open: the batch is these rows of one branch."""
        before = self.order, self.batch, self.repeats, self._copies, self._runs
        self.order, self.batch, self.repeats, self._copies, self._runs = (branch,), batch, {}, {}, {}
        try:
            yield
        finally:
            self.order, self.batch, self.repeats, self._copies, self._runs = before

    def runs(self, x: torch.Tensor, name: str = "") -> tuple[int, tuple]:
        """(axis, runs of rows of the acting branches along it) in one layer, worked out once for each shape."""
        key = (name, x.shape)
        found = self._runs.get(key)
        if found is None:
            found = self.fresh_runs(x, name)
            if not (self.repeats and REPEATED in name):
                self._runs[key] = found
        return found

    def fresh_runs(self, x: torch.Tensor, name: str = "") -> tuple[int, tuple]:
        """The same, kept nowhere: for a compiled graph."""
        layout = self.layouts.of(name)
        order, batch, axis = self.order, self.batch, layout.axis
        if len(order) == 1:
            axis = 0
        if axis and x.ndim <= axis + 1:
            raise UnknownRows(x.shape[0], batch, name)
        rows = x.shape[axis]
        if rows in self.repeats and REPEATED in name:
            order, batch, layout = self.repeats[rows], rows, BATCH
        try:
            found = spans(order, batch, rows, layout)
        except UnknownRows:
            raise UnknownRows(rows, batch, name) from None
        return axis, tuple(run for run in found if run[0] in self.acting)

    def for_each(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """An input whose one row is everybody's, once for each row of the batch; any other as it is."""
        if x.shape[0] == 1 and len(set(self.order)) > 1 and self.layouts.of(name).kind == ONE_FOR_ALL.kind:
            return x.expand(self.batch, *x.shape[1:])
        return x


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

    def acting(x: torch.Tensor) -> tuple[int, tuple]:
        """(axis, runs of rows in which a term acts)."""
        axis, runs = call.fresh_runs(x, name)
        return axis, tuple(run for run in runs if run[0] in terms)

    def run(x, *args, **kwargs):
        if not call.active:
            if call.seen is not None:
                call.seen(name, x)
            return forward(x, *args, **kwargs)
        x = call.for_each(name, x)
        parts = None
        if args or kwargs:  # more than the input: where nothing acts, that is the layer's own business
            if call.called is not None and not torch.compiler.is_compiling():
                call.called.add(name)
            if not acting(x)[1]:
                return forward(x, *args, **kwargs)
            if args:
                raise UnknownCall(name, f"{len(args)} positional arguments besides the input")
            parts = fused(name, kwargs)
            x = parts.before(x)
        # Nearly every layer of guidance, in every call but the first.
        if simple and call.called is None and not torch.compiler.is_compiling():
            axis, runs = call.runs(x, name)
            y = forward(x)
            for branch, start, length in runs:
                term = only.get(branch)
                if term is not None:
                    strengths = call.strengths_on(name, branch, start, length, y)
                    term.add(x, x.narrow(axis, start, length), y.narrow(axis, start, length), strengths)
            return y if parts is None else parts.after(y)
        watched = call.called is not None and not torch.compiler.is_compiling()
        if watched:
            call.called.add(name)
        axis, runs = acting(x)
        if not runs:
            return forward(x)

        # What changes the input does so from the last term to the first: the last was merged last.
        inputs, changed = {}, None
        for branch, start, length in runs:
            rows = x.narrow(axis, start, length)
            before, strengths = [], call.strengths[branch]
            if any(term.enters_at_places for term in terms[branch]):
                strengths = call.strengths_on(name, branch, start, length, x)
            for term in reversed(terms[branch]):
                before.append(rows)
                rows = term.enter(rows, strengths)
            inputs[branch, start] = before[::-1]
            if rows is not before[0]:
                changed = x.clone() if changed is None else changed
                changed.narrow(axis, start, length).copy_(rows)
        y = forward(x if changed is None else changed)
        if torch.is_grad_enabled():
            y = y.clone()  # terms write into it: what autograd has kept of the layer's own output stays as it was
        for branch, start, length in runs:
            out, strengths = y.narrow(axis, start, length), call.strengths_on(name, branch, start, length, y)
            for term, rows in zip(terms[branch], inputs[branch, start], strict=True):
                if isinstance(term, LowRankTerm):
                    if watched and call.observers is not None:
                        call.observers[branch].see(term, x)
                    term.add(x if changed is None else None, rows, out, strengths)
                else:
                    term.leave(rows, out, strengths, forward)
        return y if parts is None else parts.after(y)

    return run


def forward_by_branch(forward: Callable, by_rows: tuple[int | str, ...], call: ModelCall) -> Callable:
    """A forward that runs once for each run of rows of one branch, and lays the results behind each other.

    Args:
        by_rows: See `Split`.
    """

    def run(*args, **kwargs):
        if not call.active or len(set(call.order)) == 1:
            return forward(*args, **kwargs)
        parts = []
        for branch, start, length in spans(call.order, call.batch, call.batch):

            def cut(place, value):
                if place not in by_rows or not isinstance(value, torch.Tensor):
                    return value
                times, rest = divmod(value.shape[0], call.batch)
                if rest or not times:
                    raise UnknownRows(value.shape[0], call.batch)
                return value.narrow(0, start * times, length * times)

            mine = [cut(place, value) for place, value in enumerate(args)]
            named = {name: cut(name, value) for name, value in kwargs.items()}
            with call.only(branch, length):
                parts.append(forward(*mine, **named))
        return _behind_each_other(parts)

    return run


def _behind_each_other(parts: list):
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], (tuple, list)):
        return type(parts[0])(_behind_each_other(list(each)) for each in zip(*parts, strict=True))
    return parts[0]


class LayersWithTerms:
    """Puts terms into the layers of a model and takes them out again, as often as wanted.

    Args:
        find: A layer's name → the module.
        terms: A layer's name → branch → terms. Read when they are put in.
        call: Shared by all layers of the model.
        splits: (the module's name, what is split in it) for the parts that run for each branch alone.
    """

    def __init__(
        self,
        find: Callable[[str], torch.nn.Module],
        terms: Mapping[str, Mapping],
        call: ModelCall,
        splits: Iterable[tuple[str, Split]] = (),
    ):
        self._find, self._terms, self._call, self._splits = find, terms, call, tuple(splits)
        self._changed: list[tuple[torch.nn.Module, str, Callable, Callable | None]] = []

    def put_in(self) -> None:
        for name, terms in self._terms.items():
            self._call.layouts.of(name)  # looked up here, so that a compiled graph only reads it
            self._put(self._find(name), "forward", lambda old: forward_with_terms(name, old, terms, self._call))
        for name, split in self._splits:
            self._put(self._find(name), split.method, lambda old: forward_by_branch(old, split.by_rows, self._call))

    def _put(self, module: torch.nn.Module, method: str, make: Callable[[Callable], Callable]) -> None:
        before, made = module.__dict__.get(method), make(getattr(module, method))
        self._changed.append((module, method, made, before))
        setattr(module, method, made)

    def wanted(self) -> dict[torch.nn.Module, Callable[[], bool]]:
        """Each layer -> whether it has to be called in the call of the model that is running, not computed
        together with its neighbours: a term may act, or it is noted which layers are called and what they get."""
        call = self._call

        def asked(branches):
            return lambda: call.seen is not None or call.active and (
                call.called is not None or any(each in call.acting and each in call.order for each in branches)
            )

        return {self._find(name): asked(tuple(terms)) for name, terms in self._terms.items()}

    def take_out(self) -> None:
        for module, method, made, before in reversed(self._changed):  # a module may have two names
            if module.__dict__.get(method) is not made:
                continue  # what was put in below this one was taken out first, and this one with it
            if before is None:
                delattr(module, method)
            else:
                setattr(module, method, before)
        self._changed.clear()
