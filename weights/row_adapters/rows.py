"""Which rows of a layer's input belong to which branch.

A branch is a number: the side of guidance (`POSITIVE`, `NEGATIVE`), or what a merge makes of its rows (see
`masked.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

POSITIVE, NEGATIVE = 0, 1  # as the host numbers them in `cond_or_uncond`

Spans = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Layout:
    """How the rows of the batch stand in a layer's input.

    Attributes:
        kind: `BATCH`: as many rows as the batch has. `EACH`: a multiple of them; what belongs to one row of the batch
            stands together. `TILED`: a multiple; the whole batch, then the whole batch again. `TWICE`: the batch, or
            the whole batch two times. `ONE_MORE`: the batch and one row behind it that belongs to every branch.
            `ONE_FOR_ALL`: one row that belongs to every branch, and whose output may be repeated for each row of the
            batch. `CHUNKS`: any multiple of the number of chunks; what belongs to one chunk stands together (frames of
            a video that are latents of their own). `UNKNOWN`: not even as many rows as the batch has say anything.
        axis: On which axis they stand.
    """

    kind: str
    axis: int = 0


BATCH, EACH, TILED, TWICE, CHUNKS, ONE_MORE, ONE_FOR_ALL, UNKNOWN = (
    Layout(kind) for kind in ("batch", "each", "tiled", "twice", "chunks", "one more", "one for all", "unknown")
)


class UnknownRows(Exception):
    """A layer's input has another number of rows than the batch, and nothing says how they are arranged."""

    def __init__(self, rows: int, batch: int, name: str = ""):
        super().__init__(f"{rows} rows for a batch of {batch}" + (f" in {name}" if name else ""))
        self.rows, self.batch = rows, batch


def spans(order: tuple[int, ...], batch: int, rows: int, layout: Layout = BATCH) -> Spans:
    """Cuts one axis of a layer's input into runs of rows of one branch.

    Args:
        order: The branch of each chunk of the batch, in the batch's order.
        batch: Rows of the model's input: the same number for each chunk.
        rows: Rows of this layer's input, along the layout's axis.
        layout: How they are arranged; its axis is not looked at.

    Returns:
        (branch, first row, number of rows), ..., neighbours of one branch joined.

    Raises:
        UnknownRows: the number does not fit the arrangement, or a row belongs to more than one branch.
    """
    if len(set(order)) == 1:
        return ((order[0], 0, rows),)
    kind = layout.kind
    if kind == TILED.kind and rows and rows % batch == 0 or kind == TWICE.kind and rows == 2 * batch:
        order = order * (rows // batch)
    elif kind == UNKNOWN.kind or rows % len(order) or not (
        rows == batch or kind == CHUNKS.kind or kind == EACH.kind and rows and rows % batch == 0
    ):
        raise UnknownRows(rows, batch)
    length = rows // len(order)
    runs: list[tuple[int, int, int]] = []
    for place, branch in enumerate(order):
        if runs and runs[-1][0] == branch:
            runs[-1] = (branch, runs[-1][1], runs[-1][2] + length)
        else:
            runs.append((branch, place * length, length))
    return tuple(runs)
