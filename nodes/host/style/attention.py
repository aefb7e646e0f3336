"""Adds attention over image tokens to chosen cross-attentions of a UNet while the host samples.

Nothing is written into the model or into its patches: a wrapper around `apply_model` looks once a call whether it is
on, and then hands the UNet a copy of the options in which the chosen layers have a replacement. So

* what another pack put on the same layer, before or after, is what ours adds to, under a single key or a block's;
* whoever wraps the UNet itself finds ours in its place and can wrap it;
* a ControlNet, which runs before, and every layer that is not chosen are left as they are;
* switched off by the schedule, nothing is there.

Which rows of a batch are the negative side is decided in `batch_rows.py`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP

from ....weights.errors import StyleLoomError
from ....weights.unet.architecture import Layer
from ....weights.ip_adapter.keys_values import KeysValues
from ..areas import pictures_of
from ..batch_rows import Rows, noting, rows_of
from ..batch_sides import BatchSides
from ..repeated_rows import KEY as REPEATED
from ..repeated_rows import tracing
from .mask_grid import MaskGrid, areas_of, nearest
from .step_weights import StepWeights

_KEY = "styleloom_style"
_AREAS = "styleloom_areas"
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
            model_options["transformer_options"][_AREAS] = areas_of(conds, tuple(x_in.shape[2:]))
        return executor(model, conds, x_in, timestep, model_options)

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """Around one call of the UNet."""
        options = transformer_options
        if self._is_on(executor.class_obj, t):
            replace = options.get("patches_replace", {})
            attn2 = dict(replace.get("attn2", {}))
            rows = rows_of(
                self.sides, options, len(x), {"c_concat": c_concat, "c_crossattn": c_crossattn, **kwargs}
            )
            options = tracing(options, executor.class_obj.diffusion_model)
            call = _Call(self, options, len(x), _known(rows, len(x), options))
            if self.steps is not None:
                call.factor = self.steps.at(executor.class_obj.model_sampling, float(t.flatten()[0]))
            for layer in self.layers:
                before = attn2.get(layer) or attn2.get(layer[:2])
                attn2[layer] = _Replacement(call, layer, before)
            options = {**options, "patches_replace": {**replace, "attn2": attn2}}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

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
        """Keys and values for the rows of a batch, made once for each arrangement.

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


class _Call:
    """What all layers of one call of the UNet have in common, worked out once."""

    def __init__(self, style: StyleAttention, options: Mapping, count: int, rows: Rows):
        self.style, self.count = style, count
        chunks = options.get("cond_or_uncond") or [0]
        uuids = options.get("uuids") or [None] * len(chunks)
        self.sides = rows.sides
        self.frames, total = pictures_of(options, count // len(self.sides))
        self.areas = tuple((options.get(_AREAS) or {}).get(uuids[chunk]) for chunk in rows.chunks)
        self.factor = 1.0
        if not rows.plain:
            self._needs_plain("Another node lays tiles of the picture into one batch")
        for name, count in (("style", style.pictures), ("mask", style.mask.pictures if style.mask else 1)):
            if count not in (1, total):
                style.tell(name, count, total)

    def image(self, layer: Layer, q: torch.Tensor, extra_options: dict) -> torch.Tensor:
        """Attention over the image tokens, (rows, n, width), weight and mask applied."""
        sides, frames = self.sides, self.frames
        if q.shape[0] != self.count:
            sides, frames = self._repeated(q.shape[0], extra_options), (0,)
        k, v = self.style.rows(layer, sides, frames, q.device, q.dtype)
        # Pictures that share their tokens are one long row of queries: nothing is repeated for them.
        out = optimized_attention(
            q.reshape(len(k), -1, q.shape[2]),
            k,
            v,
            extra_options["n_heads"],
            attn_precision=extra_options.get("attn_precision"),
            transformer_options=extra_options,
        ).reshape(q.shape)
        if self.factor != 1.0:
            out = out * self.factor
        if self.style.mask is not None:
            out = out * self.style.mask.rows(q, extra_options, self.areas, self.frames)
        return out

    def _repeated(self, rows: int, extra_options: Mapping) -> tuple[int, ...]:
        """The side of each row of a layer whose rows another node's patch repeats."""
        places = extra_options.get(REPEATED) or ()
        if len(places) != rows:
            raise _unknown(rows, self.count, extra_options)
        self._needs_plain("Another node gives each region of the picture rows of its own (Attention Couple)")
        return tuple(self.sides[place * len(self.sides) // self.count] for place in places)

    def _needs_plain(self, found: str) -> None:
        """The rows are not the latents alone: which picture or part of it each is cannot be told."""
        if self.style.mask is not None or self.style.pictures > 1:
            raise StyleLoomError(
                f"{found}, and Style Block Injector has "
                + ("a mask" if self.style.mask is not None else "one style per picture"),
                "rows of which it is known what they show",
                "Leave mask of Style Block Injector unconnected and choose the fusion concat or average, or leave the "
                "other node out.",
            )


def _unknown(rows: int, batch: int, options: Mapping) -> StyleLoomError:
    count = len(options.get("cond_or_uncond") or [0])
    return StyleLoomError(
        f"a layer has {rows} rows, in a batch of {batch}, for {count} conditionings",
        "rows of which it is known whether they are the positive or the negative side",
        "Another node changes the batch (tiles, regional prompts) in a way that does not show whose each row is: give "
        "the two sides different prompts, or leave that node out.",
    )


def _known(rows: Rows | None, count: int, options: Mapping) -> Rows:
    if rows is None:
        raise _unknown(count, count, options)
    return rows


class _Replacement:
    """One layer's replacement: what was there, plus the picture.

    `add` lets packs that expect to stack on their own kind of replacement stack on this one.
    """

    def __init__(self, call: _Call, layer: Layer, before: Callable | None):
        self.call, self.layer, self.before = call, layer, before
        self.added: tuple[tuple[Callable, dict], ...] = ()

    def add(self, callback: Callable, **kwargs) -> None:
        self.added += ((callback, kwargs),)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict) -> torch.Tensor:
        if self.before is not None:
            out = self.before(q, k, v, extra_options) + self.call.image(self.layer, q, extra_options)
        else:
            out = optimized_attention(
                q,
                k,
                v,
                extra_options["n_heads"],
                attn_precision=extra_options.get("attn_precision"),
                transformer_options=extra_options,
            )
            image = self.call.image(self.layer, q, extra_options)
            # What our own call gave is nobody else's; an override may give what it keeps.
            fresh = not torch.is_grad_enabled() and "optimized_attention_override" not in extra_options
            out = out.add_(image) if fresh else out + image
        for callback, kwargs in self.added:
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out


def _repeat_last(t: torch.Tensor, count: int) -> torch.Tensor:
    """`count` pictures along the second axis: one for all, or the last again where there are fewer."""
    return t.expand(-1, count, -1, -1) if t.shape[1] == 1 else t[:, list(nearest(range(count), t.shape[1]))]
