"""The same additions for a UNet that `torch.compile` has turned into fixed code.

The host's compile node drops every guard on `transformer_options`. Code that was made with a replacement there wants
one for ever, code that was made without never sees one, and layers that share code share the first one's replacement.
So what changes from call to call must not come from there. Here each chosen cross-attention has, for the length of one
call, a `forward` of its own: whether it is there, and the shapes of the keys and values that it holds, are guarded like
anything else of a module, and their values are inputs of the compiled code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP

from ....weights.errors import StyleLoomError
from ....weights.ip_adapter.keys_values import KeysValues
from ....weights.unet.architecture import Layer
from .call import Call
from .cross_attentions import cross_attentions

_COMPILE = "torch.compile"  # the host's key for the wrapper that puts the compiled modules in their place


def is_compiled(unet: torch.nn.Module, options: Mapping) -> bool:
    """Whether a call of the UNet with these options runs compiled code: the host's node, or a pack's that uses the
    host's function, for all of the UNet or for its blocks; or `unet` itself."""
    wrappers = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if _COMPILE in wrappers or getattr(unet, "_compiled_call_impl", None) is not None:
        return True
    return hasattr(unet, "_orig_mod")  # what torch.compile makes of a module


class _Forward:
    """In the place of `CrossAttention.forward`: text attention plus attention over the tokens of pictures."""

    def __init__(self, module: torch.nn.Module, rows: int):
        self.module, self.rows = module, rows
        self.pictures: tuple[tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor] | None], ...] = ()

    def __call__(self, x, context=None, value=None, mask=None, transformer_options={}):
        module = self.module
        q = module.to_q(x)
        context = x if context is None else context
        k, v = module.to_k(context), module.to_v(context if value is None else value)
        if q.shape[0] != self.rows:
            raise StyleLoomError(
                f"a layer of the compiled model has {q.shape[0]} rows, in a batch of {self.rows}",
                "the rows of the batch",
                "Regional prompts (Attention Couple) and a compiled model do not go together with Style Block "
                "Injector: leave the compile node out.",
            )

        def attend(q, k, v):
            return optimized_attention(
                q, k, v, module.heads, attn_precision=module.attn_precision, transformer_options=transformer_options
            )

        out = attend(q, k, v)
        for keys, values, shares in self.pictures:
            image = attend(q.reshape(keys.shape[0], -1, q.shape[2]), keys.to(q.dtype), values.to(q.dtype))
            image = image.reshape(q.shape)
            out = out + (image if shares is None else image * shares[q.shape[1]].to(q.dtype))
        return module.to_out(out)


@contextlib.contextmanager
def forwards(call: Call, unet: torch.nn.Module, layers: Iterable[Layer], options: Mapping, x) -> Iterator[None]:
    """While open, the cross-attentions of `unet` add what `call` shows them.

    Args:
        options: `transformer_options` of the call. x: its input.

    Raises:
        StyleLoomError: another node's replacement or `forward` is on one of the layers.
    """
    modules = cross_attentions(unet)
    replaced = options.get("patches_replace", {}).get("attn2", {})
    shares = call.shares(x)
    before: dict[Layer, object] = {}
    try:
        for layer in layers:
            module = modules[layer]
            there = module.__dict__.get("forward")
            if layer in replaced or layer[:2] in replaced or not isinstance(there, _Forward | None):
                raise StyleLoomError(
                    f"the model is compiled, and another node replaces the cross-attention {layer}",
                    "a compiled model whose chosen layers nobody else replaces",
                    "Leave the compile node out, or the other node.",
                )
            made = _Forward(module, call.count)
            pair: KeysValues = call.keys_values(layer, x.device, None)
            made.pictures = (there.pictures if there is not None else ()) + ((pair.k, pair.v, shares),)
            before[layer] = there
            module.forward = made
        yield
    finally:
        for layer, there in before.items():
            if there is None:
                del modules[layer].forward
            else:
                modules[layer].forward = there
