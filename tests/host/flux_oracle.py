"""FLUX.1 computed the slow way in float64: the host's modules called by hand, attention by softmax, rope as a rotation.

Nothing of the pack is used. `add(kind, number, q)` says what a block adds: at the end of a double block to the stream
of the picture ("end"), or to what its attention gives before the projection ("attention").
"""

from __future__ import annotations

import copy
import math

import torch


def attention(q, k, v, bias=0.0):
    """softmax(QK'/sqrt(d) + bias)V, (rows, heads, n, d) each -> (rows, n, heads · d)."""
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def heads_of(x, heads):
    """(rows, n, heads · d) -> (rows, heads, n, d)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _sinusoid(t, width=256):
    """In float32, as the host has it whatever the model's dtype: its angles go up to 1000."""
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    args = (1000.0 * t)[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1).double()


def _rotated(x, ids, axes, theta):
    angles = torch.cat([ids[:, i, None].double() / theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
                        for i, d in enumerate(axes)], dim=-1)  # fmt: skip
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def _norm(x, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def _qkv(fused, norm, heads):
    q, k, v = (heads_of(t, heads) for t in fused.chunk(3, dim=-1))
    return norm.query_norm(q), norm.key_norm(k), v


def _patches(x):
    rows, c, h, w = x.shape
    return x.double().reshape(rows, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(rows, h * w // 4, -1)


def _ids(x, index):
    h, w = x.shape[2] // 2, x.shape[3] // 2
    return torch.stack([torch.full((h * w,), index), torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)], 1)


def forward(flux, x, t, context, y, guidance, add=None, at="end", reference=None, end=None, bias=None):
    """The net's output. add: (kind, number, queries, tokens of text) -> (rows, n, width) or None; with at "end" for
    the picture's queries, else for all. end: a second one, for the end of double blocks. bias: (kind, number) -> what is
    added to the scores, (rows, 1, n, n)."""
    net, heads, params = copy.deepcopy(flux).double(), flux.num_heads, flux.params
    add = add or (lambda *_: None)
    bias = bias or (lambda *_: 0.0)
    img, ids = _patches(x), _ids(x, 0)
    if reference is not None:
        img, ids = torch.cat([img, _patches(reference)], 1), torch.cat([ids, _ids(reference, 1)])
    img = net.img_in(img)
    vec = net.time_in(_sinusoid(t)) + net.vector_in(y.double()) + net.guidance_in(_sinusoid(guidance))
    txt = net.txt_in(context.double())
    n = txt.shape[1]
    ids = torch.cat([torch.zeros(n, 3, dtype=torch.long), ids])

    def rope(u):
        return _rotated(u, ids, params.axes_dim, params.theta)

    for i, block in enumerate(net.double_blocks):
        (a, b, c), (d, e, f) = block.img_mod.lin(torch.nn.functional.silu(vec))[:, None].chunk(6, -1)[:3], \
            block.img_mod.lin(torch.nn.functional.silu(vec))[:, None].chunk(6, -1)[3:]  # fmt: skip
        ta, tb, tc, td, te, tf = block.txt_mod.lin(torch.nn.functional.silu(vec))[:, None].chunk(6, -1)
        qkv = _qkv(block.img_attn.qkv(_norm(img) * (1 + b) + a), block.img_attn.norm, heads)
        text = _qkv(block.txt_attn.qkv(_norm(txt) * (1 + tb) + ta), block.txt_attn.norm, heads)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, qkv))
        attn = attention(rope(q), rope(k), v, bias("double", i))
        more = add("double", i, q, n)
        if more is not None and at == "attention":
            attn = attn + more
        img = img + c * block.img_attn.proj(attn[:, n:])
        img = img + f * block.img_mlp(_norm(img) * (1 + e) + d)
        last = end("double", i, q, n) if end else more if at == "end" else None
        if last is not None:
            img = img + last[:, n:]
        txt = txt + tc * block.txt_attn.proj(attn[:, :n])
        txt = txt + tf * block.txt_mlp(_norm(txt) * (1 + te) + td)
    both = torch.cat([txt, img], dim=1)
    for i, block in enumerate(net.single_blocks):
        a, b, c = block.modulation.lin(torch.nn.functional.silu(vec))[:, None].chunk(3, -1)
        wide = block.linear1(_norm(both) * (1 + b) + a)
        fused, mlp = wide.split([3 * flux.hidden_size, wide.shape[-1] - 3 * flux.hidden_size], dim=-1)
        q, k, v = _qkv(fused, block.norm, heads)
        attn = attention(rope(q), rope(k), v, bias("single", i))
        more = add("single", i, q, n)
        if more is not None:
            attn = attn + more
        both = both + c * block.linear2(torch.cat([attn, torch.nn.functional.gelu(mlp, approximate="tanh")], 2))
    img = both[:, n:]
    shift, scale = net.final_layer.adaLN_modulation(vec)[:, None].chunk(2, -1)
    out = net.final_layer.linear(_norm(img) * (1 + scale) + shift)[:, : x.shape[2] * x.shape[3] // 4]
    rows, h, w = len(x), x.shape[2] // 2, x.shape[3] // 2
    return out.reshape(rows, h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(rows, -1, 2 * h, 2 * w)
