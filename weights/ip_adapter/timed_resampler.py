"""InstantX's adapter for SD3.5-large: image tokens, keys and values that change with the time step.

A vector of the time step, v = W₂ silu(W₁ sinusoid(t)), is added to the picture's features; in each layer of the
resampler (shift, scale, shift', scale') = W silu(v) modulate what the norms of the queries give, before the attention
and before the feed-forward part. In a block of the model (shift, scale) = W silu(v) modulate the normed tokens before K
and V; K has a norm for each head.

Formulas: InstantX/SD3.5-Large-IP-Adapter (`TimeResampler`, `AdaLayerNorm`, `IPAttnProcessor`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

HEAD = 64  # width of a head of the resampler
_EPS = 1e-6
_SEPARATOR = "/"  # a parameter's name has no dots


class Timed(NamedTuple):
    """Of pictures at one time step: tokens (pictures, tokens, cross), and the vector of the time step, (dim,)."""

    tokens: torch.Tensor
    vector: torch.Tensor


class TimedAdapter(torch.nn.Module):
    """The adapter's tensors, so that the host can move them about; computed with in fp32, whatever they are held in.

    Args:
        projection: tensors of `image_proj`. blocks: block number → its tensors.
    """

    def __init__(self, projection: Mapping[str, torch.Tensor], blocks: Mapping[int, Mapping[str, torch.Tensor]]):
        super().__init__()
        whole = {f"image_proj.{key}": value for key, value in projection.items()}
        whole |= {f"{n}.{key}": value for n, tensors in blocks.items() for key, value in tensors.items()}
        for key, value in whole.items():
            self.register_parameter(key.replace(".", _SEPARATOR), torch.nn.Parameter(value, requires_grad=False))
        self.depth = 1 + max(int(key.split(".")[1]) for key in projection if key.startswith("layers."))

    def _weights(self, prefix: str, device: torch.device) -> _Weights:
        return _Weights(self, prefix, device)

    def tokens(self, features: torch.Tensor, timestep: float) -> Timed:
        """Image tokens.

        Args:
            features: (pictures, n, width). timestep: 0 to 1000.
        """
        w = self._weights("image_proj", features.device)
        vector = w.linear(F.silu(w.linear(sinusoid(timestep, w, features.device), "time_embedding.linear_1")),
                          "time_embedding.linear_2")  # fmt: skip
        x = w.linear(features.float(), "proj_in") + vector
        y = w("latents").expand(len(x), -1, -1)
        for i in range(self.depth):
            at = f"layers.{i}"
            shift, scale, shift_mlp, scale_mlp = w.linear(F.silu(vector), f"{at}.2.1").chunk(4)
            queries = w.norm(y, f"{at}.0.norm2") * (1 + scale) + shift
            y = y + _attention(w, f"{at}.0", w.norm(x, f"{at}.0.norm1"), queries)
            wide = w.norm(y, f"{at}.1.0") * (1 + scale_mlp) + shift_mlp
            y = y + w.linear(F.gelu(w.linear(wide, f"{at}.1.1")), f"{at}.1.3")
        return Timed(w.norm(w.linear(y, "proj_out"), "norm_out"), vector)

    def keys_values(self, number: int, timed: Timed, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one block of the model, (pictures, tokens, hidden) fp32."""
        w = self._weights(str(number), timed.tokens.device)
        shift, scale = w.linear(F.silu(timed.vector), "norm_ip.linear").chunk(2)
        x = F.layer_norm(timed.tokens, timed.tokens.shape[-1:], eps=_EPS) * (1 + scale) + shift
        k = self.normed(number, "norm_ip_k", w.linear(x, "to_k_ip").unflatten(-1, (heads, -1)))
        return k.flatten(-2), w.linear(x, "to_v_ip")

    def normed(self, number: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """x / rms(x) times the weight `name` of a block, over the last axis, which is a head; in x's dtype."""
        w = self._weights(str(number), x.device)
        return F.rms_norm(x.float(), x.shape[-1:], w(f"{name}.weight"), _EPS).to(x.dtype)


class _Weights:
    def __init__(self, adapter: TimedAdapter, prefix: str, device: torch.device):
        self.adapter, self.prefix, self.device = adapter, prefix, device

    def __call__(self, key: str) -> torch.Tensor | None:
        found = getattr(self.adapter, f"{self.prefix}.{key}".replace(".", _SEPARATOR), None)
        return None if found is None else found.to(self.device, torch.float32)

    def linear(self, x: torch.Tensor, key: str) -> torch.Tensor:
        return F.linear(x, self(f"{key}.weight"), self(f"{key}.bias"))

    def norm(self, x: torch.Tensor, key: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self(f"{key}.weight"), self(f"{key}.bias"))


def sinusoid(timestep: float, w: _Weights, device: torch.device) -> torch.Tensor:
    """cos and sin of t / 10000^(i / half), cos first, as wide as the first layer of the time embedding reads."""
    half = w("time_embedding.linear_1.weight").shape[1] // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)
    return torch.cat([torch.cos(timestep * freqs), torch.sin(timestep * freqs)])


def _attention(w: _Weights, key: str, x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    q = w.linear(queries, f"{key}.to_q")
    k, v = w.linear(torch.cat([x, queries], dim=1), f"{key}.to_kv").chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (q, k, v))
    return w.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{key}.to_out")
