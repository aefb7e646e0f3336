"""Which side of guidance each row of the model's input is on, or that it is not known.

The host lays the conditionings of a call one after the other, each with all latents: rows = conditionings x latents.
Other nodes change that between the host and the model: Tiled Diffusion cuts the picture up and lays the tiles one
after the other, without a word in `cond_or_uncond`. What the rows are is then told by what stands beside them: the
prompt of each row is one of those that the host has handed over, value for value. Where both sides have the same
prompt, or nothing fits, nobody can tell, and the caller runs the sides apart or stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...weights.row_adapters.probe import fingerprints
from .batch_sides import BatchSides

_KEY = "styleloom_rows"  # in transformer_options
_WRAPPER = "model_function_wrapper"


@dataclass(frozen=True)
class Rows:
    """The rows of one call of the model, in runs of equal length.

    Attributes:
        sides: The side of each run.
        chunks: The conditioning of each run: its place in `cond_or_uncond`.
        plain: Each conditioning stands there once, with all latents in their order.
    """

    sides: tuple[int, ...]
    chunks: tuple[int, ...]
    plain: bool


@dataclass(frozen=True)
class _Handed:
    """What the host has made of the conditionings.

    Attributes:
        latents: Rows of each conditioning.
        order: `cond_or_uncond` and `uuids`, and
        tensors: name -> what goes with the rows, one entry for each: where another node's wrapper comes in between.
    """

    latents: int
    order: Mapping | None = None
    tensors: Mapping[str, torch.Tensor] | None = None


class _Noted:
    """Another node's wrapper of the model; what it is given is noted for `rows_of`."""

    def __init__(self, inner: Callable, latents: int):
        self.inner, self.latents = inner, latents

    def __call__(self, apply_model, args):
        rows, c = args["input"].shape[0], dict(args["c"])
        options = c.get("transformer_options", {})
        order = {name: options[name] for name in ("cond_or_uncond", "uuids") if name in options}
        c["transformer_options"] = {**options, _KEY: _Handed(self.latents, order, _by_rows(c, rows))}
        return self.inner(apply_model, {**args, "c": c})


def noting(x_in: torch.Tensor, model_options: Mapping) -> dict:
    """Model options for a call of `calc_cond_batch`, with which `rows_of` can tell the rows apart.

    Args:
        x_in: The latents of the call, (latents, ...).
        model_options: The host's; they stay as they are.
    """
    made = dict(model_options)
    latents = x_in.shape[0]
    made["transformer_options"] = {**made.get("transformer_options", {}), _KEY: _Handed(latents)}
    wrapper = made.get(_WRAPPER)
    if wrapper is not None:
        made[_WRAPPER] = _Noted(wrapper.inner if isinstance(wrapper, _Noted) else wrapper, latents)
    return made


def rows_of(sides: BatchSides, options: Mapping, rows: int, given: Mapping[str, object]) -> Rows | None:
    """The rows of one call of the model.

    Args:
        options: `transformer_options` of the call, from a `calc_cond_batch` that had the options of `noting`.
        rows: Rows of the model's input.
        given: Name -> what the model gets beside its input: c_crossattn, y, ...

    Returns:
        None: it is not known.
    """
    each = sides.of_chunks(options)
    handed = options.get(_KEY)
    plain = Rows(each, tuple(range(len(each))), True)
    if len(each) == 1 or len(set(each)) == 1:
        fits = handed is None or rows == len(each) * handed.latents
        return plain if fits else Rows(each[:1], (0,), False)
    if handed is None:  # whoever calls the model without the host's sampling has laid out the batch himself
        return plain if rows % len(each) == 0 else None
    counted = rows == len(each) * handed.latents
    if handed.tensors is None:
        return plain if counted else None
    found = _by_rows(given, rows)
    if counted and handed.tensors and all(found.get(name) is tensor for name, tensor in handed.tensors.items()):
        return plain
    before = sides.of_chunks(handed.order)
    chunks = _matched(handed, found, len(before))
    if chunks is None or any(len({before[chunk] for chunk in possible}) != 1 for possible in chunks):
        # Both sides have the same prompt, or it was changed on the way: the number of rows is all there is.
        return plain if counted and (chunks is None or all(chunks)) else None
    made = _in_runs(before, tuple(min(possible) for possible in chunks), handed.latents)
    return plain if counted and made.sides == plain.sides else made


def _by_rows(given: Mapping[str, object], rows: int) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == rows
    }


def _matched(handed: _Handed, found: Mapping[str, torch.Tensor], count: int) -> list[set[int]] | None:
    """For each row the conditionings that it can be; None where there is nothing to compare."""
    possible = None
    for name, before in handed.tensors.items():
        now = found.get(name)
        if now is None or now.shape[1:] != before.shape[1:] or now.dtype != before.dtype or before.shape[0] % count:
            continue
        places: dict[int, set[int]] = {}
        for row, mark in enumerate(fingerprints(before)):
            places.setdefault(mark, set()).add(row * count // before.shape[0])
        here = [places.get(mark, set()) for mark in fingerprints(now)]
        possible = here if possible is None else [a & b for a, b in zip(possible, here, strict=True)]
    return possible


def _in_runs(each: tuple[int, ...], chunks: tuple[int, ...], latents: int) -> Rows:
    """Runs of all latents where they fit, else of one row."""
    length = latents
    if len(chunks) % length or any(len(set(chunks[i : i + length])) > 1 for i in range(0, len(chunks), length)):
        length = 1
    runs = chunks[::length]
    return Rows(tuple(each[chunk] for chunk in runs), runs, False)
