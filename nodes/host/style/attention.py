"""Adds attention over image tokens to chosen cross-attentions of a UNet while the host samples.

Nothing is written into the model or into its patches: a wrapper around `apply_model` looks once a call whether it is
on, and then hands the UNet a copy of the options in which the chosen layers have a replacement. So

* what another pack put on the same layer, before or after, is what ours adds to, under a single key or a block's;
* whoever wraps the UNet itself finds ours in its place and can wrap it;
* a ControlNet, which runs before, and every layer that is not chosen are left as they are;
* switched off by the schedule, nothing is there.

A compiled UNet does not look at its options again; for one see `compiled.py`. Which rows of a batch are the negative
side is decided in `batch_rows.py`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping

import torch
from comfy.patcher_extension import WrappersMP

from ....weights.unet.architecture import Layer
from ....weights.ip_adapter.keys_values import KeysValues
from ..areas import note_areas
from ..batch_rows import Rows, noting, rows_of
from ..batch_sides import BatchSides
from ..repeated_rows import tracing
from .call import Call, known
from .compiled import forwards, is_compiled
from .mask_grid import MaskGrid, nearest
from .replacement import Replacement
from .step_weights import StepWeights

_KEY = "styleloom_style"
_KEPT = 8  # arrangements of rows that a layer remembers; sliding windows over frames make ever new ones


class StyleAttention:
    """One injection. `install` puts it on a clone; the object is shared by all clones made from it.

    Args:
        layers: from `keys_values.project`.
        mask: (pictures, height, width) or None.
        start, end: share of the schedule, 0 to 1.
        steps: what the picture adds is multiplied by this as well, or None.
    """

    def __init__(
        self,
        layers: Mapping[Layer, KeysValues],
        mask: torch.Tensor | None = None,
        start: float = 0.0,
        end: float = 1.0,
        steps: StepWeights | None = None,
    ):
        self.pictures = max((kv.k.shape[1] for kv in layers.values()), default=1)
        self.layers = {
            layer: KeysValues(*(_repeat_last(t, self.pictures) for t in kv)) for layer, kv in layers.items()
        }
        self.mask = None if mask is None else MaskGrid(mask)
        self.start, self.end, self.steps = start, end, steps
        self._told: set = set()
        self.sides = BatchSides()
        self._cache: dict = {}
        self._window = (None, 0.0, 0.0)

    def install(self, model):
        """A clone of the MODEL with this injection; the one given stays as it is."""
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, self.outer_sample)
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, self.sampler_sample)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, self.apply_model)
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, _KEY, self.calc_cond_batch)
        return clone

    # --- wrappers

    def outer_sample(self, executor, *args, **kwargs):
        """Around a whole run: learns the sides of the conditionings, and drops the copies on the device after it."""
        self.sides.given(getattr(executor.class_obj, "conds", None))
        try:
            return executor(*args, **kwargs)
        finally:
            self.sides.forget()
            self._told = set()
            self._cache = {}
            self._window = (None, 0.0, 0.0)
            if self.mask is not None:
                self.mask.forget()

    def sampler_sample(self, executor, guider, *args, **kwargs):
        """Once the host has prepared the conditionings: areas that it copied over belong to the other side."""
        self.sides.prepared(getattr(guider, "conds", None))
        return executor(guider, *args, **kwargs)

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """Has the rows of the batch told apart, and tells the layers which part of the picture each conditioning
        sees, for the mask."""
        model_options = noting(x_in, model_options)
        if self.mask is not None:
            note_areas(model_options["transformer_options"], conds, tuple(x_in.shape[2:]))
        return executor(model, conds, x_in, timestep, model_options)

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """Around one call of the UNet."""
        options, unet = transformer_options, executor.class_obj.diffusion_model
        if not self._is_on(executor.class_obj, t):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        rows = rows_of(self.sides, options, len(x), {"c_concat": c_concat, "c_crossattn": c_crossattn, **kwargs})
        call = self.make_call(executor.class_obj, options, x, t, known(rows, len(x), options))
        if self.steps is not None:
            call.factor = self.steps.at(executor.class_obj.model_sampling, float(t.flatten()[0]))

        def run(options):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

        return self.inject(call, run, unet, options, x)

    def make_call(self, model, options, x: torch.Tensor, t: torch.Tensor, rows: Rows) -> Call:
        """What the layers of this call have in common."""
        return Call(self, options, x, rows)

    def inject(self, call: Call, run: Callable, unet, options: Mapping, x: torch.Tensor):
        """The model's output with the pictures: `run(options)` with options that have the layers' replacements."""
        if is_compiled(unet, options):
            with forwards(call, unet, self.layers, options, x):
                return run(options)
        options = tracing(options, unet)
        replace = options.get("patches_replace", {})
        attn2 = dict(replace.get("attn2", {}))
        for layer in self.layers:
            before = attn2.get(layer) or attn2.get(layer[:2])
            attn2[layer] = Replacement(call, layer, before)
        return run({**options, "patches_replace": {**replace, "attn2": attn2}})

    def tell(self, name: str, count: int, total: int) -> None:
        """Says once a run that there are more or fewer pictures than are being made."""
        if (name, count, total) not in self._told:
            self._told.add((name, count, total))
            what = "the last is used again" if count < total else f"only the first {total} are used"
            logging.warning("StyleLoom: %s has %d pictures, and %d are being made: %s", name, count, total, what)

    def _is_on(self, model, t: torch.Tensor) -> bool:
        if self.start <= 0.0 and self.end >= 1.0:
            return True
        sampling = model.model_sampling
        known, first, last = self._window
        if known is None or known() is not sampling:
            first, last = (float(sampling.percent_to_sigma(share)) for share in (self.start, self.end))
            self._window = (weakref.ref(sampling), first, last)
        return last <= float(t.flatten()[0]) <= first

    # --- keys and values by rows

    def rows(self, layer: Layer, sides: tuple[int, ...], frames: tuple[int, ...], device, dtype) -> KeysValues:
        """Keys and values for the rows of a batch, made once for each arrangement; dtype None leaves them as they are.

        Returns:
            (sides, tokens, width) where all pictures share their tokens, else (sides × frames, tokens, width).
        """
        key = (layer, sides, frames if self.pictures > 1 else (), device, dtype)
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) > _KEPT * len(self.layers):
                self._cache = {}
            found = KeysValues(*(self._arrange(t.to(device, dtype), sides, frames) for t in self.layers[layer]))
            self._cache[key] = found
        return found

    def _arrange(self, t: torch.Tensor, sides: tuple[int, ...], frames: tuple[int, ...]) -> torch.Tensor:
        if self.pictures > 1:
            t = t[:, list(nearest(frames, self.pictures))]
        return t[list(sides)].flatten(0, 1)


def _repeat_last(t: torch.Tensor, count: int) -> torch.Tensor:
    """`count` pictures along the second axis: one for all, or the last again where there are fewer."""
    return t.expand(-1, count, -1, -1) if t.shape[1] == 1 else t[:, list(nearest(range(count), t.shape[1]))]
