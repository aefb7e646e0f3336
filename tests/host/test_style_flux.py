"""Style Block Injector on FLUX.1: XLabs's and InstantX's adapters against an independent forward in float64."""

from __future__ import annotations

import flux_oracle as oracle
import pytest
import style_oracle
import torch
from safetensors.torch import save_file

SIGMA, TEXT, HEADS = 0.7, 5, 2
# The model runs in float32: 57 blocks, each with a rounding of 6e-8 times the root of its sums' lengths.
BOUND = 2e-6


@pytest.fixture(scope="module")
def flux(kit):
    return kit.dit_models.flux1_small(seed=1)


@pytest.fixture(scope="module")
def given(kit):
    g = torch.Generator().manual_seed(7)
    width, pooled = kit.dit_models.FLUX1_TEXT, kit.dit_models.FLUX1_POOLED
    return torch.randn(2, TEXT, width, generator=g), torch.randn(2, pooled, generator=g)


@pytest.fixture(scope="module")
def files(host, kit, run_node):
    folder = host.base / "models" / "ipadapter" / "flux"
    folder.mkdir(parents=True, exist_ok=True)

    def made(kind, **options):
        tensors = getattr(kit.dit_adapter_files, kind)(seed=3, loud=2.0, **options)
        save_file(tensors, str(folder / f"{kind}.safetensors"))
        return run_node("StyleLoomLoadIPAdapter", ipadapter_name=f"flux/{kind}.safetensors")[0], tensors

    return {"xlabs": made("xlabs")}


@pytest.fixture(scope="module")
def inject(run_node, files, encode):
    def injected(model, kind, preset="all", weight=0.8, seed=1, **options):
        return run_node("StyleLoomStyleBlockInjector", model=model, ipadapter=files[kind][0],
                        style={"style0": encode(seed)}, preset=preset, weight=weight, **options)  # fmt: skip

    return injected


def call(model, given, sides=(1, 0), count=1, size=(8, 12), **extra):
    """One call of the model as the sampler makes it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 16, *size, generator=g).repeat(len(sides), 1, 1, 1)
    context, y = (torch.cat([t[side : side + 1].expand(count, *t.shape[1:]) for side in sides]) for t in given)
    options = {**model.model_options["transformer_options"], "cond_or_uncond": list(sides)}
    options["wrappers"] = {kind: {key: list(w) for key, w in named.items()} for kind, named in model.wrappers.items()}
    with torch.inference_mode():
        out = model.model.apply_model(x, torch.full((len(x),), SIGMA), c_crossattn=context, y=y,
                                      guidance=torch.full((len(x),), 3.5), transformer_options=options, **extra)  # fmt: skip
    return x, context, y, out


def due(model, made, add, **more):
    x, context, y, _ = made
    net = model.model.diffusion_model
    t = torch.full((len(x),), SIGMA)
    with torch.inference_mode():
        out = oracle.forward(net, x, t, context, y, torch.full((len(x),), 3.5), add, **more)
    return x.double() - SIGMA * out


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def xlabs_tokens(tensors, embeds):
    proj = {key.removeprefix("ip_adapter_proj_model."): t for key, t in tensors.items() if "proj_model" in key}
    return style_oracle.base_tokens(proj, embeds)


def xlabs_adds(tensors, sides, weights, share=1.0):
    """sides: tokens of each row. weights: number of a double block -> weight."""
    p = {key: t.double() for key, t in tensors.items()}

    def add(kind, i, q, n):
        if kind != "double" or i not in weights:
            return None
        name = f"double_blocks.{i}.processor.ip_adapter_double_stream"
        k, v = (torch.cat(list(sides)) @ p[f"{name}_{x}_proj.weight"].T + p[f"{name}_{x}_proj.bias"] for x in "kv")
        return weights[i] * share * oracle.attention(q, oracle.heads_of(k, HEADS), oracle.heads_of(v, HEADS))

    return add


@pytest.fixture(scope="module")
def both_sides(files, encode):
    tensors = files["xlabs"][1]
    seen = xlabs_tokens(tensors, encode(1).image_embeds[:1])
    return [xlabs_tokens(tensors, torch.zeros(1, 48)), seen]  # by `cond_or_uncond`: 1 negative, 0 positive


def test_the_oracle_is_the_host(flux, given):
    made = call(flux, given)
    assert distance(made[3], due(flux, made, None)) < BOUND


def test_xlabs_adds_at_the_end_of_double_blocks(flux, given, inject, files, both_sides):
    before = call(flux, given)
    made = call(inject(flux, "xlabs")[0], given)
    add = xlabs_adds(files["xlabs"][1], both_sides, dict.fromkeys(range(19), 0.8))
    assert distance(made[3], due(flux, made, add)) < BOUND < 0.05 < distance(made[3], before[3])
    assert torch.equal(call(flux, given)[3], before[3])
