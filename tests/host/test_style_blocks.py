"""Style Block Injector in the real host: layers hit, and what they compute, against slow arithmetic in float64."""

from __future__ import annotations

import pytest
import style_oracle as oracle
import torch
from style_calls import blocks, call, plan

COUNTS = {
    "sdxl": {"style": 10, "layout": 10, "style + layout": 20, "all": 70, "IPAdapter Plus: style": 10,
             "IPAdapter Plus: layout": 10},
    "sd1.5": {"style": 3, "layout": 3, "style + layout": 6, "all": 16, "IPAdapter Plus: style": 11,
              "IPAdapter Plus: layout": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(models, texts):
    return {name: call(models[name][0], texts[name]) for name in COUNTS}


@pytest.mark.parametrize("architecture", COUNTS)
@pytest.mark.parametrize("preset", list(COUNTS["sdxl"]))
def test_layers_and_values(architecture, preset, models, adapters, encode, texts, run_node, plain):
    model = models[architecture][0]
    adapter, parts = adapters("base", architecture)
    style, layout = encode(1), encode(2)
    patched = run_node(
        "StyleLoomStyleBlockInjector", model=model, ipadapter=adapter, style={"style0": style}, preset=preset,
        weight=0.7, layout_weight=0.4, layout=layout)[0]  # fmt: skip
    unet = model.model.diffusion_model
    layers = list(oracle.modules(unet))
    style_set, layout_set = {
        "sdxl": ([("output", 1)], [("input", 8)]),
        "sd1.5": ([("output", n) for n in (3, 4, 5)], [("input", 7), ("input", 8), ("middle", 0)]),
    }[architecture]
    share = dict.fromkeys(layout_set, 1.0)
    if preset.startswith("IPAdapter") and architecture == "sd1.5":
        order = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
        style_set = [order[i] for i in (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15)]
        layout_set, share = [order[4], order[5]], {order[4]: 0.25, order[5]: 1.0}
    weights, whose = {}, {}
    for layer in layers:
        if preset.endswith(("style", "style + layout")) and layer[:2] in style_set:
            weights[layer], whose[layer] = 0.7, style
        if preset.endswith("layout") and layer[:2] in layout_set:
            weights[layer] = (0.4 if "+" in preset else 0.7) * share[layer[:2]]
            whose[layer] = layout
        if preset == "all":
            weights[layer] = 0.4 if layer[:2] in layout_set else 0.7
            whose[layer] = layout if layer[:2] in layout_set else style
    assert len(weights) == COUNTS[architecture][preset]

    uncond = oracle.base_tokens(parts["image_proj"], torch.zeros(1, 48))
    full = {}
    for picture in (style, layout):
        mine = {layer: w for layer, w in weights.items() if whose[layer] is picture}
        full |= plan(unet, parts, mine, oracle.base_tokens(parts["image_proj"], picture.image_embeds), uncond)
    with oracle.injected(unet, full) as hit:
        due = call(model, texts[architecture])
    assert sorted(hit) == sorted(layers) and set(hit.values()) == {1}
    made = call(patched, texts[architecture])
    assert float((due - plain[architecture]).abs().max()) > 1e-3
    assert torch.allclose(made, due, atol=2e-5 * float(due.abs().max()), rtol=1e-4)
    assert torch.equal(call(model, texts[architecture]), plain[architecture]), "the model given is as it was"
    assert model.wrappers == {} and "patches_replace" not in model.model_options["transformer_options"]


@pytest.mark.parametrize("kind", ["plus", "full"])
def test_plus_and_full_with_the_published_negative_side(kind, models, adapters, encode, texts, run_node, vision):
    model = models["sdxl"][0]
    adapter, parts = adapters(kind, "sdxl")
    style = encode(1)
    patched = run_node("StyleLoomStyleBlockInjector", model=model, ipadapter=adapter, style={"style0": style},
                       preset="style", weight=1.0)[0]  # fmt: skip
    tokens = {"plus": oracle.plus_tokens, "full": oracle.full_tokens}[kind]
    with torch.inference_mode():
        empty = vision.model(pixel_values=torch.zeros(1, 3, 224, 224), intermediate_output=-2)[1]
    unet = model.model.diffusion_model
    weights = dict.fromkeys(blocks(unet, ("output", 1)), 1.0)
    sides = (tokens(parts["image_proj"], t) for t in (style.penultimate_hidden_states, empty))
    with oracle.injected(unet, plan(unet, parts, weights, *sides)):
        due = call(model, texts["sdxl"])
    made = call(patched, texts["sdxl"])
    assert torch.allclose(made, due, atol=2e-5 * float(due.abs().max()), rtol=1e-4)
