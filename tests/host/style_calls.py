"""One call of a UNet as the sampler makes it, and what the oracle of the style nodes is told to add to it."""

from __future__ import annotations

import style_oracle as oracle
import torch

SIZE = 16  # latents of 16 × 16
SIGMA = 3.0


def keys_values(parts, number, tokens):
    return tuple(tokens @ parts["ip_adapter"][f"{number}.to_{name}_ip.weight"].double().T for name in "kv")


def plan(unet, parts, weights, cond, uncond, order=(1, 0)):
    """The oracle's plan: `weights` by layer, tokens of both sides, `order` the sides in a batch."""
    numbers = oracle.numbers(unet)

    def at(number, weight):
        def rows(count, n):
            pairs = [keys_values(parts, number, uncond if side else cond) for side in order]
            each = count // len(order)
            k, v = (torch.cat([p[i].expand(each, -1, -1) for p in pairs]) for i in (0, 1))
            return k, v, weight

        return rows

    return {layer: at(numbers[layer], weight) for layer, weight in weights.items()}


def call(model, text, sides=(1, 0), count=1, seed=0, size=SIZE, sigma=SIGMA, **options):
    """One call of the UNet as the sampler makes it: the sides of guidance in one batch."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, size, size, generator=g).repeat(len(sides), 1, 1, 1)
    sigma = torch.full((len(x),), sigma)
    context = torch.cat([text[side].repeat(count, 1, 1) for side in sides])
    extra = {"y": torch.zeros(len(x), model.model.adm_channels)} if model.model.adm_channels else {}
    if type(model.model).__name__ == "SDXL":
        extra = {
            "y": torch.randn(1, model.model.diffusion_model.label_emb[0][0].in_features, generator=g).expand(len(x), -1)
        }
    given = {**model.model_options["transformer_options"], "cond_or_uncond": list(sides), **options}
    given["wrappers"] = {kind: {key: list(w) for key, w in named.items()} for kind, named in model.wrappers.items()}
    with torch.inference_mode():
        return model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=given, **extra)


def blocks(unet, *names):
    return [layer for layer in oracle.modules(unet) if layer[:2] in names]
