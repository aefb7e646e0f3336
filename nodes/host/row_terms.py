"""What guidance and the merge both need to put terms into a model's layers: targets, dtype, and the host's memory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Hashable

import comfy.model_patcher
import torch


def parts_of(target: Hashable) -> tuple[str, tuple[int, int, int] | None, Callable | None]:
    """A target of the host's key map as (key, part, swap).

    Args:
        target: The weight's key; or (key, (axis, start, length)) for a part of the weight, or None there for the
            whole; or with a third entry, the function that puts the rows of a change into the order of the weight.
    """
    return (*target, None)[:3] if isinstance(target, tuple) else (target, None, None)


def computed_in(model) -> torch.dtype | None:
    """The dtype of a MODEL's activations; None where the host does not say."""
    dtype = getattr(model.model, "manual_cast_dtype", None) or model.model_dtype()
    return dtype if dtype is None or dtype.itemsize > 1 else None  # 8 bits are storage


def carry(model, key: str, terms: torch.nn.Module) -> None:
    """Let a MODEL bring the tensors of some terms along: as an additional model, like a ControlNet, the host counts
    them, loads them and moves them out.

    Args:
        model: A clone, which is changed.
        key: Under which name; what stood there before is replaced.
    """
    if next(terms.parameters(), None) is None:
        return
    patcher = comfy.model_patcher.ModelPatcher(
        terms, load_device=model.load_device, offload_device=model.offload_device
    )
    model.set_additional_models(key, [patcher])


def outside_memory_graph() -> contextlib.AbstractContextManager:
    """For tensors that live on after the pass that made them: hosts from 0.34 on record the memory of a step and hand
    out the same addresses in the next."""
    prefetch = sys.modules.get("comfy.model_prefetch")
    return getattr(prefetch, "pause_malloc_graph", contextlib.nullcontext)()
