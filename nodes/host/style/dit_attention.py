"""Adds attention over image tokens to chosen blocks of a diffusion transformer while the host samples.

As in `attention.py` nothing is written into the model: a wrapper around `apply_model` hands the model a copy of the
options, in which the chosen blocks have a replacement. The replacement runs what was there before, another node's or
the block itself, and works on the block inside it: a node that leaves a block out leaves the picture out as well.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from comfy.ldm.modules.attention import optimized_attention

from ....weights.errors import StyleLoomError
from ....weights.unet.architecture import Layer
from .attention import StyleAttention
from .call import Call, unknown
from .compiled import is_compiled


class DiTCall(Call):
    """One call of a transformer.

    Attributes:
        size: rows and columns of the tokens of the picture that is made.
        target: how many these are; the tokens of reference pictures (Kontext), which stand behind them, get nothing.
    """

    def __init__(self, style, options: Mapping, x: torch.Tensor, rows, patch: int):
        super().__init__(style, options, x, rows)
        self.size = tuple(-(-side // patch) for side in x.shape[-2:])
        self.target = self.size[0] * self.size[1]

    def share(self, like: torch.Tensor) -> torch.Tensor | None:
        """The mask on the tokens of the picture, (1 or rows, target, 1); None without a mask."""
        mask = self.style.mask
        return None if mask is None else mask.tokens(self.size, self.areas, self.frames, self.count, like)

    def attend(self, layer: Layer, q: torch.Tensor, options: Mapping) -> torch.Tensor:
        """Attention over the image tokens, weights applied and the mask not.

        Args:
            q: (rows, heads, n, width of a head), as the block has made it, before rope.

        Returns:
            (rows, n, heads · width of a head).
        """
        if q.shape[0] != self.count:
            raise unknown(f"a block has {q.shape[0]} rows, in a batch of {self.count}", options)
        heads, n = q.shape[1], q.shape[2]
        flat = q.transpose(1, 2).flatten(2)
        k, v = self.keys_values(layer, q.device, q.dtype)
        # Pictures that share their tokens are one long row of queries: nothing is repeated for them.
        long = flat.reshape(len(k), -1, flat.shape[2])
        return optimized_attention(long, k, v, heads, transformer_options=options).reshape(self.count, n, -1)


class DiTStyle(StyleAttention):
    """One injection into a transformer.

    Args:
        block: makes the replacement of a block: (call, layer, what was there before) → callable.
        others: as for `StyleAttention`.
    """

    def __init__(self, block: Callable, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.block = block

    def make_call(self, model, options: Mapping, x: torch.Tensor, t: torch.Tensor, rows) -> DiTCall:
        return DiTCall(self, options, x, rows, model.diffusion_model.patch_size)

    def inject(self, call: DiTCall, run: Callable, net, options: Mapping, x: torch.Tensor):
        if is_compiled(net, options):
            raise StyleLoomError(
                "model is compiled (TorchCompileModel), and Style Block Injector has an adapter for a transformer",
                "a model that is not compiled: the compiled code of a transformer's blocks does not see the picture",
                "Leave the compile node out.",
            )
        replace = options.get("patches_replace", {})
        dit = dict(replace.get("dit", {}))
        for layer in self.layers:
            key = ("single_block" if layer[0] == "single" else "double_block", layer[1])
            dit[key] = self.block(call, layer, dit.get(key))
        return run({**options, "patches_replace": {**replace, "dit": dit}})


class BlockReplacement(ABC):
    """One block's replacement. What was there before runs around it."""

    def __init__(self, call: DiTCall, layer: Layer, before: Callable | None):
        self.call, self.layer, self.before = call, layer, before

    def __call__(self, args: dict, extra: dict) -> dict:
        own = functools.partial(self.run, extra["original_block"])
        return own(args) if self.before is None else self.before(args, {**extra, "original_block": own})

    @abstractmethod
    def run(self, original: Callable, args: dict) -> dict:
        """The block itself, with the picture added."""


def with_patch(options: Mapping, **patches: Callable) -> dict:
    """A copy of `transformer_options` with one patch more at the end of each list."""
    there = options.get("patches", {})
    return {**options, "patches": {**there, **{k: [*there.get(k, ()), patch] for k, patch in patches.items()}}}
