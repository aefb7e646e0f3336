"""What stands in the place of a cross-attention: what was there, plus the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ldm.modules.attention import optimized_attention

from ....weights.unet.architecture import Layer
from .call import OVERRIDE, Call


class Replacement:
    """One layer's replacement.

    `add` lets packs that expect to stack on their own kind of replacement stack on this one.
    """

    def __init__(self, call: Call, layer: Layer, before: Callable | None):
        self.call, self.layer, self.before = call, layer, before
        self.added: tuple[tuple[Callable, dict], ...] = ()

    def add(self, callback: Callable, **kwargs) -> None:
        self.added += ((callback, kwargs),)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict) -> torch.Tensor:
        if self.before is not None:
            text = self.before(q, k, v, extra_options)
        else:
            text = optimized_attention(
                q,
                k,
                v,
                extra_options["n_heads"],
                attn_precision=extra_options.get("attn_precision"),
                transformer_options=extra_options,
            )
        # What our own call gave is nobody else's; an override may give what it keeps.
        ours = self.before is None and OVERRIDE not in extra_options
        out = self.call.add(self.layer, text, q, extra_options, ours)
        for callback, kwargs in self.added:
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out
