"""From a picture's features to the tokens that the cross-attentions read.

Formulas: tencent-ailab/IP-Adapter, `ImageProjModel`, `MLPProjModel` and `Resampler`; sizes from the tensors. All in
fp32 whatever the file holds: it is done once for a picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import StyleLoomError
from .dit_formats import INSTANTX, XLABS, DiTAdapter
from .formats import BASE, FULL, HEAD, Adapter, depth

_VECTOR = (BASE, XLABS, INSTANTX)  # kinds that read one vector of a picture


def image_tokens(adapter: Adapter | DiTAdapter, features: torch.Tensor) -> torch.Tensor:
    """Project features.

    Args:
        adapter: from `formats.recognise`.
        features: (pictures, width) for the kinds that read one vector, (pictures, tokens, width) otherwise; any float
            dtype and device.

    Returns:
        (pictures, tokens, cross) fp32 on the device of the features.

    Raises:
        StyleLoomError: features of another size, or NaN.
    """
    ndim = 2 if adapter.kind in _VECTOR else 3
    if features.ndim != ndim or features.shape[-1] != adapter.width:
        raise StyleLoomError(
            f"{adapter.feature} is {list(features.shape)}",
            f"{adapter.width} numbers a {'picture' if ndim == 2 else 'token'} for {adapter.name}",
            f"Encode the picture with {adapter.encoder.file}." if adapter.encoder else "Use the adapter's encoder.",
        )
    x = features.float()
    made_by = {BASE: _linear, XLABS: _linear, INSTANTX: _wide_mlp, FULL: _mlp}.get(adapter.kind, _resampler)
    tokens = made_by(_Weights(adapter, x.device), x)
    if not bool(tokens.isfinite().all()):
        raise StyleLoomError(
            f"the image tokens of {adapter.name} are not finite",
            "finite numbers",
            "The adapter's file or the encoded picture is damaged: download the file, or encode the picture again.",
        )
    return tokens


class _Weights:
    """The tensors of `image_proj`, cast when they are asked for and not kept."""

    def __init__(self, adapter: Adapter | DiTAdapter, device: torch.device):
        self.adapter, self.device = adapter, device

    def __call__(self, key: str) -> torch.Tensor | None:
        found = self.adapter.projection.get(key)
        return None if found is None else found.to(self.device, torch.float32)

    def linear(self, x: torch.Tensor, key: str) -> torch.Tensor:
        return F.linear(x, self(f"{key}.weight"), self(f"{key}.bias"))

    def norm(self, x: torch.Tensor, key: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self(f"{key}.weight"), self(f"{key}.bias"))


def _linear(w: _Weights, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm(reshape(W x + b))."""
    return w.norm(w.linear(x, "proj").view(len(x), -1, w.adapter.cross), "norm")


def _wide_mlp(w: _Weights, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm(reshape(W₂ gelu(W₀ x + b₀) + b₂)), from one vector to all tokens (InstantX, FLUX.1)."""
    wide = w.linear(F.gelu(w.linear(x, "proj.0")), "proj.2")
    return w.norm(wide.view(len(x), -1, w.adapter.cross), "norm")


def _mlp(w: _Weights, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm(W₂ gelu(W₀ x + b₀) + b₂) for each token."""
    return w.norm(w.linear(F.gelu(w.linear(x, "proj.0")), "proj.2"), "proj.3")


def _resampler(w: _Weights, x: torch.Tensor) -> torch.Tensor:
    """Learned queries that look at the picture and at themselves, layer by layer (Perceiver)."""
    x = w.linear(x, "proj_in")
    latents = w("latents").expand(len(x), -1, -1)
    for i in range(depth(w.adapter.projection)):
        latents = latents + _attention(w, f"layers.{i}.0", x, latents)
        wide = F.gelu(w.linear(w.norm(latents, f"layers.{i}.1.0"), f"layers.{i}.1.1"))
        latents = latents + w.linear(wide, f"layers.{i}.1.3")
    return w.norm(w.linear(latents, "proj_out"), "norm_out")


def _attention(w: _Weights, key: str, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    latents = w.norm(latents, f"{key}.norm2")
    both = torch.cat([w.norm(x, f"{key}.norm1"), latents], dim=1)
    q = w.linear(latents, f"{key}.to_q")
    k, v = w.linear(both, f"{key}.to_kv").chunk(2, dim=-1)
    q, k, v = (t.view(len(t), t.shape[1], -1, HEAD).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return w.linear(out.transpose(1, 2).flatten(2), f"{key}.to_out")
