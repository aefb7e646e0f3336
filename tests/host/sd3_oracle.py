"""SD3.5-large and InstantX's adapter computed the slow way in float64: the host's modules called by hand.

Nothing of the pack is used.
"""

from __future__ import annotations

import copy
import math

import torch
from flux_oracle import attention, heads_of
from style_oracle import gelu, norm

silu = torch.nn.functional.silu


def sinusoid(t, width):
    """cos first, in float32: its angles go up to 1000."""
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    args = torch.tensor(t, dtype=torch.float32) * freqs
    return torch.cat([args.cos(), args.sin()]).double()


def plain_norm(x):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rms(x, weight):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


class Adapter:
    """The adapter's file, in float64."""

    def __init__(self, tensors):
        self.p = {key: value.double() for key, value in tensors.items()}

    def linear(self, x, key):
        out = x @ self.p[f"{key}.weight"].T
        return out + self.p[f"{key}.bias"] if f"{key}.bias" in self.p else out

    def norm(self, x, key):
        return norm(x, self.p[f"{key}.weight"], self.p[f"{key}.bias"])

    def tokens(self, features, t):
        """(pictures, n, width) at time step t -> (tokens, vector of the time step)."""
        at = "image_proj"
        wave = self.p[f"{at}.time_embedding.linear_1.weight"].shape[1]
        vector = self.linear(silu(self.linear(sinusoid(t, wave), f"{at}.time_embedding.linear_1")),
                             f"{at}.time_embedding.linear_2")  # fmt: skip
        x = self.linear(features.double(), f"{at}.proj_in") + vector
        y = self.p[f"{at}.latents"].expand(len(x), -1, -1)
        for i in range(2):
            a, b, c, d = self.linear(silu(vector), f"{at}.layers.{i}.2.1").chunk(4)
            own = f"{at}.layers.{i}.0"
            q = self.norm(y, f"{own}.norm2") * (1 + b) + a
            k, v = self.linear(torch.cat([self.norm(x, f"{own}.norm1"), q], 1), f"{own}.to_kv").chunk(2, -1)
            seen = attention(*(heads_of(t, t.shape[-1] // 64) for t in (self.linear(q, f"{own}.to_q"), k, v)))
            y = y + self.linear(seen, f"{own}.to_out")
            h = self.norm(y, f"{at}.layers.{i}.1.0") * (1 + d) + c
            y = y + self.linear(gelu(self.linear(h, f"{at}.layers.{i}.1.1")), f"{at}.layers.{i}.1.3")
        return self.norm(self.linear(y, f"{at}.proj_out"), f"{at}.norm_out"), vector

    def seen(self, n, tokens, vector, q, k, v, heads):
        """What block n adds for one row: tokens (1, n, cross); q, k, v (1, heads, n, 64) of the picture."""
        at = f"ip_adapter.{n}"
        shift, scale = self.linear(silu(vector), f"{at}.norm_ip.linear").chunk(2)
        x = plain_norm(tokens) * (1 + scale) + shift
        ip_k, ip_v = (heads_of(self.linear(x, f"{at}.to_{part}_ip"), heads) for part in "kv")
        q, k, ip_k = (rms(a, self.p[f"{at}.{name}.weight"]) for a, name in ((q, "norm_q"), (k, "norm_k"), (ip_k, "norm_ip_k")))
        return attention(q, torch.cat([k, ip_k], 2), torch.cat([v, ip_v], 2))


def _qkv(part, x, vector, count):
    mods = part.adaLN_modulation[1](silu(vector))[:, None].chunk(count, -1)
    q, k, v = part.attn.qkv(plain_norm(x) * (1 + mods[1]) + mods[0]).chunk(3, -1)
    q, k, v = (heads_of(t, part.attn.num_heads) for t in (q, k, v))
    return rms(q, part.attn.ln_q.weight), rms(k, part.attn.ln_k.weight), v, mods


def _after(part, x, attn, mods):
    x = x + mods[2] * part.attn.proj(attn)
    h = torch.nn.functional.gelu(part.mlp.fc1(plain_norm(x) * (1 + mods[4]) + mods[3]), approximate="tanh")
    return x + mods[5] * part.mlp.fc2(h)


def forward(sd3, x, t, context, y, add=None):
    """The net's output; t: the time step, a number. add: (block, q, k, v of the picture) -> (rows, n, width) or None."""
    net, (rows, c, h, w) = copy.deepcopy(sd3).double(), x.shape
    patches = x.double().reshape(rows, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(rows, h * w // 4, -1)
    img = patches @ net.x_embedder.proj.weight.flatten(1).T + net.x_embedder.proj.bias
    img = img + sd3.cropped_pos_embed((h, w)).double()
    vector = net.t_embedder.mlp(sinusoid(t, 256))[None] + net.y_embedder.mlp(y.double())
    txt = net.context_embedder(context.double())
    n = txt.shape[1]
    for i, block in enumerate(net.joint_blocks):
        last = block.context_block.pre_only
        q, k, v, mods = _qkv(block.x_block, img, vector, 6)
        tq, tk, tv, tmods = _qkv(block.context_block, txt, vector, 2 if last else 6)
        attn = attention(*(torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v))))
        seen = attn[:, n:]
        more = add(i, q, k, v) if add else None
        if more is not None:
            seen = seen + more
        if not last:
            txt = _after(block.context_block, txt, attn[:, :n], tmods)
        img = _after(block.x_block, img, seen, mods)
    shift, scale = net.final_layer.adaLN_modulation(vector)[:, None].chunk(2, -1)
    out = net.final_layer.linear(plain_norm(img) * (1 + scale) + shift).reshape(rows, h // 2, w // 2, 2, 2, -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(rows, -1, h, w)
