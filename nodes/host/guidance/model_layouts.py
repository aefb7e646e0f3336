"""How the rows of the batch stand in the layers of the model at hand: from the table, or found out by running it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping

from ....weights.row_adapters.forward import ModelCall
from ....weights.row_adapters.layouts import Layouts, Split
from ....weights.row_adapters.probe import Seen, changed, layouts_found
from ....weights.row_adapters.rows import NEGATIVE, POSITIVE, UnknownRows
from ..batch_rows import Rows

_NET = "diffusion_model"
_OURS = "styleloom_"  # how the keys of our own wrappers begin


def split_points(model, layouts: Layouts, names: Iterable[str]) -> list[tuple[str, Split]]:
    """The parts of a model that have to be run for each side alone, of those that have one of the layers `names`.

    Args:
        model: The host's BaseModel.
        layouts: Of its net.
    """
    found = []
    for split in layouts.splits:
        for name, _ in model.diffusion_model.named_modules():
            whole = f"{_NET}.{name}" if name else _NET
            meant = re.search(split.module, name) if split.module else not name
            if meant and any(layer.startswith(f"{whole}.") for layer in names):
                found.append((whole, split))
    return found


def order_in_layers(rows: Rows | None, layouts: Layouts, given: Mapping, batch: int, count: int) -> tuple[int, ...]:
    """The side of each run of rows, as the model's layers get them.

    Args:
        rows: Those of the model's input; None: not known.
        given: Name -> what the model gets beside its input.
        batch: Rows of the input. count: Conditionings of the call.

    Raises:
        UnknownRows: it is not known, or the model mixes rows of both sides.
    """
    if rows is not None and len(set(rows.sides)) == 1:
        return rows.sides[:1]
    mixed = rows is None or any(given.get(name) is not None for name in layouts.apart)
    if mixed or layouts.swaps and not (rows.plain and len(rows.sides) == 2):
        raise UnknownRows(batch, count)
    return rows.sides[::-1] if layouts.swaps else rows.sides


class Unlisted:
    """Layouts of models whose class is in no table, for one sampling run."""

    def __init__(self):
        self._found: dict[tuple, Layouts] = {}

    def find(self, run: Callable, call: ModelCall, order: tuple[int, ...], given: tuple, name: str) -> None:
        """Have `call` know the layouts, from three more calls of the model: see `probe.py`.

        Args:
            run: The rest of `apply_model`.
            given: What it is called with: x, t, c_concat, c_crossattn, control, transformer_options, the others by
                name.
            name: Of the model's class, for the error and the log.

        Raises:
            UnknownRows: a layer stays unknown, or the model cannot be run once more in between: what other nodes have
                put on it may count the calls, and a control's tensors are used up by one.
        """
        *tensors, control, options, others = given
        batch, key = tensors[0].shape[0], (name, tensors[0].shape, order)
        if key not in self._found:
            wrappers = [each for kind in (options.get("wrappers") or {}).values() for each in kind]
            foreign = any(not str(each).startswith(_OURS) for each in wrappers)
            if control is not None or foreign or options.get("patches") or options.get("patches_replace"):
                raise UnknownRows(batch, batch, f"{name}, which is in no table, with other nodes on it")
            seen = {}
            try:
                for branch in (None, POSITIVE, NEGATIVE):
                    call.seen = seen[branch] = Seen()
                    inputs = (changed(value, order, batch, branch) for value in tensors)
                    named = {other: changed(value, order, batch, branch) for other, value in others.items()}
                    run(*inputs, None, dict(options), **named)
            finally:
                call.seen = None
            self._found[key] = layouts_found(seen, order, batch)
            logging.info(
                "StyleLoom: Asymmetric CFG: %s is in no table of models; three more calls of it have shown that both "
                "sides can run in one batch",
                name,
            )
        if call.layouts is not self._found[key]:
            call.layouts = self._found[key]
            call.forget()
