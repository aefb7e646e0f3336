"""Finding out by running how the rows of the batch stand in each layer of a model that nobody has described.

The model is run three times without any term: as it is, with the rows of one branch changed, and with those of the
other. A row of a layer's input belongs to a branch when it changes with that branch and with no other. Equal inputs
give equal bits, so a change is seen exactly; where anything else happens (rows that are mixed, rows that are shared,
another number of rows from run to run), the layer stays unknown.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .layouts import Layouts
from .rows import BATCH, EACH, TILED, UNKNOWN, Layout, UnknownRows, spans

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(tensor: torch.Tensor, axis: int = 0) -> list[int]:
    """One number for each place on an axis, of all bits there: equal rows have equal ones, and others but by a rare
    chance."""
    flat = tensor.detach().movedim(axis, 0).reshape(tensor.shape[axis], -1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    bits = flat.contiguous().view(_BITS[flat.dtype.itemsize]).to(torch.int64)
    weights = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int64) * 0x9E3779B97F4A7C1 | 1
    return (bits * weights).sum(1).tolist()


class Seen:
    """What the layers of one run were given: a fingerprint of each place on each axis, except the channels."""

    def __init__(self):
        self.inputs: dict[str, list[tuple]] = {}

    def __call__(self, name: str, x: torch.Tensor) -> None:
        axes = range(max(1, x.ndim - 1))
        made = (tuple(x.shape), tuple(tuple(fingerprints(x, axis)) for axis in axes))
        self.inputs.setdefault(name, []).append(made)


def changed(value, order: tuple[int, ...], batch: int, branch: int):
    """A copy of what goes into a model, in which the rows of one branch are others: tensors of as many rows as the
    batch, also in lists. Whole numbers and masks stay."""
    if isinstance(value, (list, tuple)):
        return type(value)(changed(each, order, batch, branch) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    value = value.clone()
    if not value.is_floating_point() or value.ndim == 0 or value.shape[0] != batch:
        return value
    for side, start, length in spans(order, batch, batch):
        if side != branch:
            continue
        rows = value.narrow(0, start, length)
        if rows.ndim == 1:
            rows.mul_(0.9)
            continue
        ramp = torch.linspace(0.6, 1.4, rows.shape[-1], device=rows.device, dtype=rows.dtype)
        rows.mul_(ramp).add_(0.1 * ramp)
    return value


def found(seen: Mapping[int | None, Seen], order: tuple[int, ...], batch: int) -> dict[str, Layout | None]:
    """The layout of each layer, or None where the runs fit no layout.

    Args:
        seen: None -> the run as it is, branch -> the run in which its rows were changed.
        order, batch: See `rows.spans`.
    """
    made = {}
    for name, calls in seen[None].inputs.items():
        others = {branch: each.inputs.get(name, []) for branch, each in seen.items() if branch is not None}
        shapes = [shape for shape, _ in calls]
        layouts = _candidates(calls) if all([shape for shape, _ in each] == shapes for each in others.values()) else []
        made[name] = next((layout for layout in layouts if _fits(calls, others, layout, order, batch)), None)
    return made


def _candidates(calls: list[tuple]) -> list[Layout]:
    axes = range(min(len(marks) for _, marks in calls))
    return [Layout(kind, axis) for axis in axes for kind in (BATCH.kind, EACH.kind, TILED.kind)]


def _fits(calls, others, layout: Layout, order, batch) -> bool:
    for place, (shape, marks) in enumerate(calls):
        try:
            runs = spans(order, batch, shape[layout.axis], layout)
        except UnknownRows:
            return False
        for side, start, length in runs:
            for branch, each in others.items():
                now = each[place][1][layout.axis]
                for row in range(start, start + length):
                    if (now[row] != marks[layout.axis][row]) != (branch == side):
                        return False
    return True


def layouts_found(seen: Mapping[int | None, Seen], order: tuple[int, ...], batch: int) -> Layouts:
    """The same as a table for this model.

    Raises:
        UnknownRows: a layer fits no layout.
    """
    layouts = found(seen, order, batch)
    for name, layout in layouts.items():
        if layout is None:
            raise UnknownRows(seen[None].inputs[name][0][0][0], batch, name)
    return Layouts(((r"", UNKNOWN),), _found=layouts)  # a layer that has not run may be anything
