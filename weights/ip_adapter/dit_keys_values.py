"""Keys and values for the blocks of FLUX.1, made once: its image tokens do not change while sampling.

XLabs: K = W_k t + b_k, V = W_v t + b_v. InstantX: K = rms(W_k t), V = rms(W_v t), the root mean square of each head
(no parameters, eps 1e-5). The weight of a picture and of a block multiply what comes out of that, not the tokens: a
norm or a bias would not follow them. w softmax(Q K') V = softmax(Q K') (w V).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from ..errors import StyleLoomError
from ..unet.architecture import Layer
from .dit_formats import INSTANTX, DiTAdapter
from .keys_values import KeysValues

_EPS = 1e-5


def project_flux(
    adapter: DiTAdapter,
    chosen: Mapping[Layer, tuple[float, str]],
    tokens: Mapping[str, torch.Tensor],
    shares: Mapping[str, torch.Tensor],
    heads: int,
    dtype: torch.dtype = torch.bfloat16,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[Layer, KeysValues]:
    """Keys and values of the chosen blocks.

    Args:
        chosen: block → (weight, whose picture).
        tokens: by picture ("style", "layout"), each (2, pictures, tokens, cross) fp32, on the device to compute on.
        shares: by picture, the weight of each token, (2, pictures, tokens, 1).
        heads: of the model. dtype: of the result; computed in fp32 and rounded once. on_layer: called after each.

    Returns:
        Block → keys and values (2, pictures, tokens, hidden) on the CPU.

    Raises:
        StyleLoomError: NaN or infinity.
    """
    made = {}
    for layer, (weight, whose) in chosen.items():
        source = tokens[whose]
        k, v = (
            F.linear(
                source,
                part.weight.to(source.device, torch.float32),
                None if part.bias is None else part.bias.to(source.device, torch.float32),
            )
            for part in adapter.blocks[layer[:2]]
        )
        if adapter.kind == INSTANTX:
            k, v = (rms(t.unflatten(-1, (heads, -1)), _EPS).flatten(-2) for t in (k, v))
        pair = KeysValues(k.to(dtype).cpu(), (v * shares[whose].to(v.device) * weight).to(dtype).cpu())
        if not all(bool(t.isfinite().all()) for t in pair):
            raise StyleLoomError(
                f"{adapter.name}: the keys and values of {layer[0]} block {layer[1]} are not finite",
                "finite numbers",
                "The file is damaged (download it again), or the weight is far too high.",
            )
        made[layer] = pair
        on_layer()
    return made


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
