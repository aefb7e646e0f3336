"""InstantX's IP-Adapter in the blocks of SD3.5-large.

Beside the block's joint attention the picture's queries attend once more, to the picture's own keys and to those of
the image tokens together, all with norms of the adapter's; that, times the weight, is added to what the joint attention
gives the picture, before its projection. Image tokens, keys and values are of the time step of the call.

A block calls the host's attention with the options that it was given, so an override in these options sees its queries,
keys and values.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import optimized_attention

from ....weights.errors import StyleLoomError
from ....weights.ip_adapter.dit_formats import DiTAdapter
from ....weights.ip_adapter.timed_resampler import Timed, TimedAdapter
from ....weights.unet.architecture import Layer
from .call import OVERRIDE, unknown
from .dit_attention import BlockReplacement, DiTCall, DiTStyle
from .mask_grid import nearest

_KEY = "styleloom_style"
Sides = tuple[torch.Tensor, torch.Tensor]  # features of the positive and of the negative side, (pictures, n, width)


class SD3Call(DiTCall):
    """One call of SD3.

    Attributes:
        timestep: 0 to 1000.

    Raises:
        StyleLoomError: rows at different time steps.
    """

    def __init__(self, style, options: Mapping, x: torch.Tensor, rows, patch: int, timesteps: torch.Tensor):
        super().__init__(style, options, x, rows, patch)
        self.timestep = float(timesteps.flatten()[0])
        if not bool((timesteps == timesteps.flatten()[0]).all()):
            raise StyleLoomError(
                "the rows of a call of the model are at different time steps, and the IP-Adapter's tokens are of one",
                "one time step for all rows",
                "Leave out the node that samples parts of the batch at times of their own.",
            )
        self._made: dict = {}

    def timed(self, whose: str, side: int, device) -> Timed:
        """The tokens of one side, made once a call; several references are side by side unless they are one each."""
        if (whose, side) not in self._made:
            features = self.style.features[whose][side].to(device)
            made = self.style.adapter.tokens(features, self.timestep)
            if not self.style.each:
                made = Timed(made.tokens.flatten(0, 1)[None], made.vector)
            self._made[whose, side] = made
        return self._made[whose, side]


class SD3Style(DiTStyle):
    """One injection.

    Args:
        adapter: its tensors. chosen: layer → (weight, whose picture). features: by picture, of both sides.
        each: one picture for each that is made.
    """

    def __init__(
        self,
        adapter: TimedAdapter,
        chosen: Mapping[Layer, tuple[float, str]],
        features: Mapping[str, Sides],
        each: bool,
        **when,
    ):
        super().__init__(SD3Block, {}, **when)
        self.adapter, self.layers, self.features, self.each = adapter, dict(chosen), features, each
        self.pictures = max(len(t) for sides in features.values() for t in sides) if each else 1

    def make_call(self, model, options: Mapping, x: torch.Tensor, t: torch.Tensor, rows) -> SD3Call:
        return SD3Call(self, options, x, rows, model.diffusion_model.patch_size, model.model_sampling.timestep(t))


class _Override:
    """In the place of the host's attention in one block: what another node has put there, or the host's, and then the
    picture."""

    def __init__(self, block: SD3Block, options: Mapping):
        self.block, self.before, self.calls = block, options.get(OVERRIDE), 0
        outside = self.before
        while isinstance(outside, _Override):
            outside = outside.before
        self.options = {key: value for key, value in options.items() if key != OVERRIDE}
        if outside is not None:
            self.options[OVERRIDE] = outside

    def __call__(self, attention, q, k, v, *rest, **kwargs):
        run = attention if self.before is None else functools.partial(self.before, attention)
        out = run(q, k, v, *rest, **kwargs)
        self.calls += 1
        return self.block.with_picture(out, q, k, v, kwargs["heads"] if "heads" in kwargs else rest[0], self.options)


class SD3Block(BlockReplacement):
    call: SD3Call

    def run(self, original: Callable, args: dict) -> dict:
        options = args["transformer_options"]
        override = _Override(self, options)
        out = original({**args, "transformer_options": {**options, OVERRIDE: override}})
        if override.calls != 1:
            raise StyleLoomError(
                f"block {self.layer[1]} of this model calls ComfyUI's attention {override.calls} times with the "
                "options that it was given",
                "once, as in SD3.5-large",
                "Update ComfyUI, or leave out the node that replaces the blocks or the attention of the model.",
            )
        return out

    def with_picture(self, out, q, k, v, heads: int, options: Mapping) -> torch.Tensor:
        """The joint attention's result (rows, n, width), with the picture's part added to the last tokens."""
        call = self.call
        if q.shape[0] != call.count:
            raise unknown(q.shape[0], call.count, options)
        q, k, v = (t.flatten(2)[:, -call.target :] for t in (q, k, v))
        weight, whose = call.style.layers[self.layer]
        q, k = (self._normed(name, t, heads) for name, t in (("norm_q", q), ("norm_k", k)))
        parts, each = [], call.count // len(call.sides)
        for run, side in enumerate(call.sides):
            rows = slice(run * each, (run + 1) * each)
            more = call.style.adapter.keys_values(self.layer[1], call.timed(whose, side, q.device), heads)
            which = list(nearest(call.frames, len(more[0])))
            more = (t.to(q.dtype)[which] if len(t) > 1 else t.to(q.dtype).expand(each, -1, -1) for t in more)
            keys, values = (torch.cat(pair, dim=1) for pair in zip((k[rows], v[rows]), more))
            parts.append(optimized_attention(q[rows], keys, values, heads, transformer_options=options))
        image = torch.cat(parts) * (weight * call.factor)
        share = call.share(image)
        out = out.clone()
        out[:, -call.target :] += image if share is None else image * share
        return out

    def _normed(self, name: str, t: torch.Tensor, heads: int) -> torch.Tensor:
        return self.call.style.adapter.normed(self.layer[1], name, t.unflatten(-1, (heads, -1))).flatten(-2)


_patchers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def install_sd3(model, adapter: DiTAdapter, chosen, features: Mapping[str, Sides], each: bool, **when):
    """A clone of the MODEL with one injection more. The adapter goes with it as an additional model: the host counts,
    loads and moves it; injections of one adapter share it."""
    if adapter not in _patchers:
        numbers = {block[1]: tensors for block, tensors in adapter.blocks.items()}
        _patchers[adapter] = comfy.model_patcher.ModelPatcher(
            TimedAdapter(adapter.projection, numbers),
            load_device=model.load_device,
            offload_device=model.offload_device,
        )
    patcher = _patchers[adapter]
    clone = SD3Style(patcher.model, chosen, features, each, **when).install(model)
    there = clone.get_additional_models_with_key(_KEY)
    if all(other.model is not patcher.model for other in there):
        clone.set_additional_models(_KEY, [*there, patcher])
    return clone
