"""Models, adapters, encoded pictures and one call of a UNet, for the tests of the style nodes."""

from __future__ import annotations

import pytest
import style_oracle as oracle
import torch
from safetensors.torch import save_file

SIZE = 16  # latents of 16 × 16
SIGMA = 3.0


@pytest.fixture(scope="module")
def models(run_node):
    return {name: run_node("StyleLoomKitModel", architecture=name, seed=0) for name in ("sdxl", "sd1.5")}


@pytest.fixture(scope="module")
def vision(run_node):
    return run_node("StyleLoomKitVision", seed=0)[0]


@pytest.fixture(scope="module")
def encode(run_node, vision):
    def encoded(seed, count=1, **options):
        image = torch.rand(count, 40, 64, 3, generator=torch.Generator().manual_seed(seed))
        return run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image, **options)[0]

    return encoded


@pytest.fixture(scope="module")
def adapters(host, kit, run_node):
    """(kind, model) → (what Load IP-Adapter gives, the file's two dicts)."""
    made = {}
    folder = host.base / "models" / "ipadapter" / "made"
    folder.mkdir(parents=True, exist_ok=True)

    def adapter(kind, model):
        if (kind, model) not in made:
            cross, width = {"sdxl": 80, "sd1.5": 32}[model], 48 if kind == "base" else 64
            parts = kit.ip_adapter_files.ip_adapter_tensors(kind, model, 32, width, cross, seed=3, loud=2.0)
            flat = {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}
            save_file(flat, str(folder / f"{kind}_{model}.safetensors"))
            name = f"made/{kind}_{model}.safetensors"
            made[kind, model] = run_node("StyleLoomLoadIPAdapter", ipadapter_name=name)[0], parts
        return made[kind, model]

    return adapter


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


def call(model, text, sides=(1, 0), count=1, seed=0, size=SIZE, **options):
    """One call of the UNet as the sampler makes it: the sides of guidance in one batch."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, size, size, generator=g).repeat(len(sides), 1, 1, 1)
    sigma = torch.full((len(x),), SIGMA)
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


@pytest.fixture(scope="module")
def texts():
    g = torch.Generator().manual_seed(5)
    return {"sdxl": torch.randn(2, 1, 11, 80, generator=g), "sd1.5": torch.randn(2, 1, 11, 32, generator=g)}


def blocks(unet, *names):
    return [layer for layer in oracle.modules(unet) if layer[:2] in names]
