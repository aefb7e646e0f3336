"""Which rows of a layer's input belong to which branch.

A branch is a number: the side of guidance (`POSITIVE`, `NEGATIVE`), or what a merge makes of its rows (see
`masked.py`).
"""

from __future__ import annotations

POSITIVE, NEGATIVE = 0, 1  # as the host numbers them in `cond_or_uncond`

# A transformer that sees reference pictures may run its time embedding a second time, at sigma 0, and lay those rows
# behind all others. The batch then stands twice in a row, whole, instead of every row twice.
TILED = frozenset({"Flux", "NextDiT", "NextDiTPixelSpace", "QwenImageTransformer2DModel"})

Spans = tuple[tuple[int, int, int], ...]


class UnknownRows(Exception):
    """A layer's input has another number of rows than the batch, and nothing says how they are arranged."""

    def __init__(self, rows: int, batch: int):
        super().__init__(f"{rows} rows for a batch of {batch}")
        self.rows, self.batch = rows, batch


def spans(order: tuple[int, ...], batch: int, rows: int, tiled: bool = False) -> Spans:
    """Cuts the leading axis of a layer's input into runs of rows of one branch.

    Args:
        order: The branch of each chunk of the batch, in the batch's order.
        batch: Rows of the model's input: the same number for each chunk.
        rows: Rows of this layer's input.
        tiled: Twice the batch means the whole batch two times, one after the other.

    Returns:
        (branch, first row, number of rows), … , neighbours of one branch joined.

    Raises:
        UnknownRows: the number fits no known arrangement, and more than one branch is there.
    """
    if len(set(order)) == 1:
        return ((order[0], 0, rows),)
    if rows == 2 * batch and tiled:
        order = order * 2
    elif rows != batch or rows % len(order):
        raise UnknownRows(rows, batch)
    length = rows // len(order)
    runs: list[tuple[int, int, int]] = []
    for place, branch in enumerate(order):
        if runs and runs[-1][0] == branch:
            runs[-1] = (branch, runs[-1][1], runs[-1][2] + length)
        else:
            runs.append((branch, place * length, length))
    return tuple(runs)
