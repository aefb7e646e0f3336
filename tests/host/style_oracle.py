"""What Style Block Injector promises, computed the slow way in float64: text attention + weight · image attention.

Nothing of the pack is used: the tokens and the keys and values come from the file's tensors by the formulas of the
publication, and the cross-attentions of the host's UNet are replaced by plain softmax arithmetic.
"""

from __future__ import annotations

import contextlib
import math

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(QKᵀ/√d)V by heads, (rows, n, width) each."""
    rows, n, width = q.shape
    out = torch.empty_like(q)
    d = width // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d), dim=-1)
        out[..., part] = weights @ v[..., part]
    return out


def norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5) * w + b


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def base_tokens(proj: dict, z: torch.Tensor) -> torch.Tensor:
    p = {key: value.double() for key, value in proj.items()}
    cross = len(p["norm.weight"])
    tokens = (z.double() @ p["proj.weight"].T + p["proj.bias"]).reshape(len(z), -1, cross)
    return norm(tokens, p["norm.weight"], p["norm.bias"])


def full_tokens(proj: dict, x: torch.Tensor) -> torch.Tensor:
    p = {key: value.double() for key, value in proj.items()}
    hidden = gelu(x.double() @ p["proj.0.weight"].T + p["proj.0.bias"])
    return norm(hidden @ p["proj.2.weight"].T + p["proj.2.bias"], p["proj.3.weight"], p["proj.3.bias"])


def plus_tokens(proj: dict, x: torch.Tensor) -> torch.Tensor:
    p = {key: value.double() for key, value in proj.items()}
    x = x.double() @ p["proj_in.weight"].T + p["proj_in.bias"]
    y = p["latents"].expand(len(x), -1, -1)
    layers = 1 + max(int(key.split(".")[1]) for key in p if key.startswith("layers."))
    for i in range(layers):
        a = {key.removeprefix(f"layers.{i}."): value for key, value in p.items() if key.startswith(f"layers.{i}.")}
        queries = norm(y, a["0.norm2.weight"], a["0.norm2.bias"])
        keys = torch.cat([norm(x, a["0.norm1.weight"], a["0.norm1.bias"]), queries], dim=1) @ a["0.to_kv.weight"].T
        inner = keys.shape[-1] // 2
        seen = attention(queries @ a["0.to_q.weight"].T, keys[..., :inner], keys[..., inner:], inner // 64)
        y = y + seen @ a["0.to_out.weight"].T
        hidden = gelu(norm(y, a["1.0.weight"], a["1.0.bias"]) @ a["1.1.weight"].T)
        y = y + hidden @ a["1.3.weight"].T
    return norm(y @ p["proj_out.weight"].T + p["proj_out.bias"], p["norm_out.weight"], p["norm_out.bias"])


def modules(unet) -> dict[tuple, object]:
    """(kind, number, index) → cross-attention, found by the module names of the original UNet."""
    found = {}
    for name, module in unet.named_modules():
        parts = name.split(".")
        if parts[-1] == "attn2":
            kind = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}[parts[0]]
            number = 0 if kind == "middle" else int(parts[1])
            found[(kind, number, int(parts[-2]))] = module
    return found


def numbers(unet) -> dict[tuple, int]:
    """(kind, number, index) → the file's number: down, up, middle, odd."""
    order = sorted(modules(unet), key=lambda key: (("input", "output", "middle").index(key[0]), key[1], key[2]))
    return {key: 2 * i + 1 for i, key in enumerate(order)}


@contextlib.contextmanager
def injected(unet, plan: dict):
    """While open, the cross-attentions of `unet` add image attention, and every call is counted in what it yields.

    plan: layer → function of (rows, tokens n) that gives (k, v, weight): k, v (rows, tokens, width) in float64,
    weight a number or (rows, n, 1).
    """
    hit: dict[tuple, int] = {}

    def forward(layer, module):
        def run(x, context=None, value=None, mask=None, transformer_options={}):
            hit[layer] = hit.get(layer, 0) + 1
            w = {name: getattr(module, name).weight.double() for name in ("to_q", "to_k", "to_v")}
            q = x.double() @ w["to_q"].T
            c = context.double()
            out = attention(q, c @ w["to_k"].T, c @ w["to_v"].T, module.heads)
            if layer in plan:
                k, v, weight = plan[layer](len(x), x.shape[1])
                out = out + weight * attention(q, k, v, module.heads)
            return module.to_out(out.to(x.dtype))

        return run

    found = modules(unet)
    try:
        for layer, module in found.items():
            module.forward = forward(layer, module)
        yield hit
    finally:
        for module in found.values():
            del module.forward
