"""Layers that the host computes together with the activation before them, without calling them.

`comfy.ops.linear_input_act(linear, x, act)` is linear(act(x)) in one kernel where the weight is INT8 (later also where
it is fp16 and the host runs with --fast fp16_accumulation). A replaced forward, or a hook on the module, would then do
nothing at all. While a run of ours is open, that function calls the layers of the run, and is itself for all others.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import comfy.ops
import torch

from ...weights.errors import StyleLoomError
from ...weights.row_adapters.fused import NAMES, UnknownCall, fused
from .versions import host_versions

SEAM = "linear_input_act"

_lock = threading.RLock()  # another run may be in another thread
_wanted: dict[int, Callable[[], bool]] = {}
_open = 0
_shims: dict[Callable, Callable] = {}  # one for each function below, so that compiled graphs meet the same one again


def _over(below: Callable) -> Callable:
    if below not in _shims:

        def linear_input_act(linear, x, *args, **kwargs):
            wanted = _wanted.get(id(linear))
            if wanted is None or not wanted():
                return below(linear, x, *args, **kwargs)
            if len(args) > len(NAMES):
                raise UnknownCall("", f"{len(args)} arguments, where {len(NAMES)} are known: {', '.join(NAMES)}")
            parts = fused("", dict(zip(NAMES, args)) | kwargs)
            return parts.after(linear(parts.before(x)))

        _shims[below] = linear_input_act
    return _shims[below]


def is_quantised(layer: torch.nn.Module) -> bool:
    """Its weight is one of the host's quantised tensors."""
    return hasattr(getattr(layer, "weight", None), "_layout_cls")


def may_be_fused(layer: torch.nn.Module) -> bool:
    """The host may compute this layer without calling it: quantised, or fp16 with --fast fp16_accumulation."""
    fast = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    weight = getattr(layer, "weight", None)
    return is_quantised(layer) or (fast and weight is not None and weight.dtype == torch.float16)


@contextlib.contextmanager
def called(layers: Mapping[torch.nn.Module, Callable[[], bool]]) -> Iterator[None]:
    """While open, the host calls these layers where it would compute them without.

    Args:
        layers: Layer → whether that is needed in the call of the model that is running. See `LayersWithTerms.wanted`.

    Raises:
        StyleLoomError: the host calls one of them in a way that is not known here.
    """
    global _open
    if not hasattr(comfy.ops, SEAM):
        with _told():
            yield
        return
    own = {id(layer): wanted for layer, wanted in layers.items()}
    with _lock:
        before = {key: _wanted[key] for key in own if key in _wanted}
        _wanted.update(own)
        if _open == 0:
            below = getattr(comfy.ops, SEAM)
            if below not in _shims.values():  # one that another pack has put back later is there already
                setattr(comfy.ops, SEAM, _over(below))
        _open += 1
    try:
        with _told():
            yield
    finally:
        with _lock:
            for key in own:
                _wanted.pop(key, None)
            _wanted.update(before)
            _open -= 1
            if _open == 0:
                _take_out()


def _take_out() -> None:
    """Puts back what was there before. Another pack may have put a function of its own over ours meanwhile: then ours
    stays below it, and does nothing."""
    standing = getattr(comfy.ops, SEAM)
    for below, shim in _shims.items():
        if standing is shim:
            setattr(comfy.ops, SEAM, below)
            return


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except UnknownCall as unknown:
        raise StyleLoomError(
            f"{unknown}, so that its input is not known ({host_versions()})",
            f"a layer that is called with its input, and with no more than {', '.join(NAMES)}",
            "Update StyleLoom, load the model in another precision, or use the LoRA with Apply LoRA.",
        ) from unknown
