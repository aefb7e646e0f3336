"""Weights that one side has changed, without the host's weight hooks: these stop on models with quantised layers, and
merge into no weight that is computed without its layer.

The change is made when the weight is used, from the weight as the host has it then (dequantised, moved, patched), so
nothing is rounded back to the stored precision and nothing has to be undone. What is no layer's weight or bias is
exchanged for the time of one call of the model. Either way a call has the rows of one side only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import comfy.lora
import comfy.utils
import torch

from ....weights.row_adapters.forward import ModelCall
from ....weights.row_adapters.layers import layer_of
from ..lora_patches import find_module
from ..row_terms import parts_of

Change = tuple[int, int, object, object]  # branch, source, target, patch


class ChangedWeights:
    """The changes of one model.

    Args:
        root: The host's model.
        changes: A weight's key → its changes, in the order in which they are merged.
        call: Says which side a call has, and how strong its LoRAs are.
    """

    def __init__(self, root: torch.nn.Module, changes: Mapping[str, list[Change]], call: ModelCall):
        self._root, self._changes, self._call = root, changes, call
        self._used = {key: functions for key in changes if (functions := self._functions(key)) is not None}

    def _functions(self, key: str) -> tuple[torch.nn.Module, str] | None:
        """Where the host keeps the functions that it gives this weight to before each use, or None. Norms count as
        without: attention may take their weight by itself."""
        name, _, parameter = key.rpartition(".")
        module = find_module(self._root, name)
        layer = None if module is None else layer_of(module)
        attribute = f"{parameter}_function"
        known = layer is not None and layer.kind != "norm" and isinstance(getattr(module, attribute, None), list)
        return (module, attribute) if known else None

    @contextlib.contextmanager
    def put_in(self) -> Iterator[None]:
        """While open, layers use the weights of the side that a call has."""
        added = []
        try:
            for key, (module, attribute) in self._used.items():
                function = self._function(key)
                setattr(module, attribute, [*getattr(module, attribute), function])
                added.append((module, attribute, function))
            yield
        finally:
            for module, attribute, function in added:
                setattr(module, attribute, [each for each in getattr(module, attribute) if each is not function])

    def _function(self, key: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight: self._changed(key, weight) if self._call.active else weight

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """While open, all other weights are those of the side that the call has. They are small: norms, tokens."""
        before = {}
        try:
            for key in self._changes.keys() - self._used.keys():
                weight = comfy.utils.get_attr(self._root, key)
                changed = self._changed(key, weight.detach().clone())
                before[key] = weight
                comfy.utils.set_attr_param(self._root, key, changed.to(weight.dtype))
            yield
        finally:
            for key, weight in before.items():
                comfy.utils.set_attr(self._root, key, weight)

    def _changed(self, key: str, weight: torch.Tensor) -> torch.Tensor:
        patches = []
        for branch, source, target, patch in self._changes[key]:
            strength = self._call.strengths[branch][source]
            if branch == self._call.order[0] and strength != 0:
                _, part, swap = parts_of(target)
                patches.append((strength, patch, 1.0, part, swap))
        return comfy.lora.calculate_weight(patches, weight, key) if patches else weight
