"""What users of IPAdapter Plus look for, in the real host: precise types, weights by frame and step, a mask for each
reference, encodings as files, what the encoder is shown, and converted workflows that the host accepts."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import style_oracle as oracle
import torch
from style_calls import SIGMA, blocks, call, keys_values

ROOT = Path(__file__).resolve().parents[2]
STYLE, LAYOUT = [("output", 1)], [("input", 8)]


@pytest.fixture(scope="module")
def sdxl(models):
    return models["sdxl"][0]


@pytest.fixture(scope="module")
def node(run_node, adapters, encode, sdxl):
    def injected(style=None, kind="base", preset="style", model=None, **options):
        style = {"style0": encode(1)} if style is None else style
        return run_node("StyleLoomStyleBlockInjector", model=sdxl if model is None else model,
                        ipadapter=adapters(kind, "sdxl")[0], style=style, preset=preset, **options)  # fmt: skip

    return injected


def close(a, b):
    return torch.allclose(a, b, atol=2e-5 * float(b.abs().max()), rtol=1e-4)


@pytest.fixture(scope="module")
def due(sdxl, adapters, texts):
    """One call by the oracle. `plan`: layer -> (weight, positive tokens, negative tokens), tokens None for nothing."""
    parts, unet = adapters("base", "sdxl")[1], sdxl.model.diffusion_model
    numbers = oracle.numbers(unet)

    def at(number, weight, positive, negative):
        def rows(count, n):
            each, made = count // 2, []
            for tokens in (negative, positive):  # the sides of `call`
                if tokens is None:
                    width = len(parts["ip_adapter"][f"{number}.to_k_ip.weight"])
                    pair = [torch.zeros(1, 1, width, dtype=torch.float64)] * 2
                else:
                    pair = keys_values(parts, number, tokens)
                made.append([t.expand(each, -1, -1) for t in pair])
            length = math.lcm(*(k.shape[1] for k, _ in made))
            k, v = (torch.cat([pair[i].repeat(1, length // pair[i].shape[1], 1) for pair in made]) for i in (0, 1))
            return k, v, weight

        return rows

    def computed(plan, count=1):
        with oracle.injected(unet, {layer: at(numbers[layer], *entry) for layer, entry in plan.items()}):
            return call(sdxl, texts["sdxl"], count=count)

    return computed


@pytest.fixture(scope="module")
def tokens(adapters):
    proj = adapters("base", "sdxl")[1]["image_proj"]
    return lambda z: oracle.base_tokens(proj, torch.zeros(1, 48) if z is None else z)


@pytest.mark.parametrize(("preset", "two"), [("precise style", False), ("precise style", True), ("precise layout", True),
                                             ("IPAdapter Plus: composition precise", False)])  # fmt: skip
def test_precise_types(preset, two, sdxl, node, due, tokens, encode, texts):
    """In the blocks that are turned round the negative side sees the picture, the positive side nothing or the other."""
    unet, w, boost = sdxl.model.diffusion_model, 0.7, 1.3
    style, layout = encode(1), encode(2)
    s, other, empty = tokens(style.image_embeds), tokens(layout.image_embeds), tokens(None)
    if preset == "precise style":
        plan = {layer: (w, s, empty) for layer in blocks(unet, *STYLE)}
        plan |= {layer: (boost, other if two else None, s) for layer in blocks(unet, *LAYOUT)}
    elif preset == "precise layout":
        plan = {layer: (w, other, empty) for layer in blocks(unet, *LAYOUT)}
        plan |= {layer: (boost, s, other) for layer in blocks(unet, *STYLE)}
    else:
        plan = {layer: (boost * 0.1, None, s) for layer in oracle.modules(unet)}
        plan |= {layer: (boost, None, s) for layer in blocks(unet, *STYLE)}
        plan |= {layer: (w, s, empty) for layer in blocks(unet, *LAYOUT)}
    options = {"layout": layout} if two else {}
    patched, report = node(preset=preset, weight=w, boost=boost, **options)
    assert close(call(patched, texts["sdxl"]), due(plan))
    assert "(the negative side sees the picture) at 1.3: " in report and "0.7: " in report


def test_weights_by_frame_and_by_step(sdxl, node, due, tokens, encode, texts, run_node):
    unet, style = sdxl.model.diffusion_model, encode(1)
    s, empty = tokens(style.image_embeds), tokens(None)
    text, back, count, curve, *pictures, _ = run_node("StyleLoomStyleWeights", weights="1.2, 0", timing="linear", frames=4)
    assert (text, back, count) == ("1.2, 0.8, 0.4, 0", "0, 0.4, 0.8, 1.2", 4) and curve.shape[0] == 1
    assert pictures == [None, None]
    pictures = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(2))
    made = run_node("StyleLoomStyleWeights", weights="1, 0", timing="linear", frames=3, image=pictures,
                    method="shift batches", add_ending_frames=1)  # fmt: skip
    assert (made[0], made[2], made[6]) == ("1, 0.5, 0, 0", 4, "0, 0.5, 1, 1")
    assert torch.equal(made[4], pictures[[0, 0, 0, 1]]) and torch.equal(made[5], pictures[[1, 1, 1, 1]])
    # One reference, a weight for each picture; a fifth picture gets the last weight, 0, again.
    patched, report = node(fusion="one per picture", reference_weights=text, weight=1.5)
    rows = 1.5 * torch.tensor([1.2, 0.8, 0.4, 0, 0], dtype=torch.float64).repeat(2).view(-1, 1, 1)
    made = call(patched, texts["sdxl"], count=5)
    assert close(made, due({layer: (rows, s, empty) for layer in blocks(unet, *STYLE)}, count=5))
    assert "reference_weights: 1.2, 0.8, 0.4, 0" in report and "style 1; fusion one per picture" in report
    assert "style: the last of 1 references is used again" not in report, "one for all is nothing to tell"

    sampling = sdxl.get_model_object("model_sampling")
    log = sampling.log_sigmas.double().numpy()
    share = 1 - np.interp(math.log(SIGMA), log, np.arange(len(log))) / (len(log) - 1)
    place = (share - 0.2) / 0.7 * 2
    assert 0 < place < 1
    patched, report = node(step_weights="2, 0, 1", start_percent=0.2, end_percent=0.9)
    plan = {layer: (2 - 2 * float(place), s, empty) for layer in blocks(unet, *STYLE)}
    # percent_to_sigma is in fp32: the place is known to some 1e-4.
    made, wanted = call(patched, texts["sdxl"]), due(plan)
    assert torch.allclose(made, wanted, atol=5e-4 * float(wanted.abs().max()), rtol=1e-3)
    assert "step_weights: 2, 0, 1" in report and "acts from 20% to 90% of the schedule" in report


def test_one_per_mask_is_one_injection_for_each(node, encode, texts, run_node, vision, monkeypatch):
    image = torch.rand(1, 60, 64, 3, generator=torch.Generator().manual_seed(6))
    style, masks = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image, fit="tiled")
    quarters = [image[:, y : y + 30, x : x + 30] for y in (0, 30) for x in (2, 32)]
    assert masks.shape == (4, 512, 512) and torch.equal(masks.sum(0), torch.ones(512, 512))
    chained = None
    for i, quarter in enumerate(quarters):
        single = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=quarter, fit="crop")[0]
        assert torch.allclose(single.image_embeds, style.image_embeds[i : i + 1], rtol=1e-4, atol=1e-5)
        lit = torch.zeros(1, 512, 512)
        lit[:, 256 * (i // 2) :][:, :256, 256 * (i % 2) :][..., :256] = 1
        assert torch.equal(masks[i : i + 1], lit)
        chained = node({"style0": single}, mask=lit, model=chained)[0]
    patched, report = node({"style0": style}, fusion="one per mask", mask=masks)
    made = call(patched, texts["sdxl"])
    assert close(made, call(chained, texts["sdxl"])) and not close(made, call(node({"style0": style})[0], texts["sdxl"]))
    assert "style 4; fusion one per mask" in report and "mask: 4" in report
    with pytest.raises(ValueError, match="one per mask, style has 4 references and mask 3 masks"):
        node({"style0": style}, fusion="one per mask", mask=masks[:3])


def test_the_report(node, encode, adapters):
    report = node({"style0": encode(1), "style1": encode(2)}, fusion="norm average", reference_weights="1",
                  layout=encode(2), block_weights="6: 1")[1]  # fmt: skip
    assert adapters("base", "sdxl")[0].label in report
    for words in ("preset style: 10 of 70 layers, scaling V", "  style at 1: output 1", "style 2; fusion norm average",
                  "negative side: nothing, as published", "the last of 1 stands for the rest of 2",
                  "layout is connected, but preset style shows it to no layer", "block_weights count only"):  # fmt: skip
        assert words in report
    assert "the model is as it was" in node(weight=0.0)[1]
    with pytest.raises(ValueError, match="reference_weights has 2 numbers, and style 1 references"):
        node(reference_weights="1, 2")


def encoded(run_node, vision, image, **options):
    return run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image, **{"fit": "crop"} | options)[0]


def test_what_the_encoder_is_shown(run_node, vision):
    image = torch.rand(2, 60, 40, 3, generator=torch.Generator().manual_seed(8))

    def same(a, b):
        return torch.allclose(a.penultimate_hidden_states, b.penultimate_hidden_states, rtol=1e-4, atol=1e-4)

    top = encoded(run_node, vision, image, position="top")
    assert same(top, encoded(run_node, vision, image[:, :40])) and not same(top, encoded(run_node, vision, image))
    assert same(encoded(run_node, vision, image, position="bottom"), encoded(run_node, vision, image[:, 20:]))
    assert same(encoded(run_node, vision, image, position="left"), encoded(run_node, vision, image))
    mask = torch.zeros(1, 60, 40)
    mask[:, :, :20] = 1
    gray = image.clone()
    gray[:, :, 20:] = torch.tensor(vision.image_mean)
    half = encoded(run_node, vision, image, mask=mask)
    assert same(half, encoded(run_node, vision, gray)) and not same(half, encoded(run_node, vision, image))
    nothing = encoded(run_node, vision, image, mask=torch.zeros(30, 20))
    assert same(nothing, encoded(run_node, vision, torch.tensor(vision.image_mean).expand(2, 9, 9, 3)))
    louder, plain = encoded(run_node, vision, image, weight=1.5), encoded(run_node, vision, image)
    assert torch.equal(louder.image_embeds, plain.image_embeds * 1.5)
    assert torch.equal(louder.styleloom_empty, plain.styleloom_empty)
    with pytest.raises(ValueError, match="mask is .* for 2 pictures"):
        encoded(run_node, vision, image, mask=torch.ones(3, 8, 8))


def test_encodings_as_files(host, run_node, node, encode, texts):
    style = encode(1)
    run_node("StyleLoomSaveStyleEncoding", encoded=style, filename_prefix="fox/one")
    found = host.nodes["StyleLoomLoadStyleEncoding"].INPUT_TYPES()["required"]["encoding_name"][1]["options"]
    assert "fox/one_00001_.safetensors" in found
    loaded = run_node("StyleLoomLoadStyleEncoding", encoding_name="fox/one_00001_.safetensors")[0]
    for kind in ("base", "plus"):
        made = call(node({"style0": loaded}, kind=kind)[0], texts["sdxl"])
        assert torch.equal(made, call(node({"style0": style}, kind=kind)[0], texts["sdxl"]))
    folder = host.base / "models" / "style_encodings"
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in (("v", style.image_embeds), ("h", style.penultimate_hidden_states)):
        torch.save(tensor, folder / f"{name}.ipadpt")
    host.folder_paths.filename_list_cache.clear()
    vector, patches = (run_node("StyleLoomLoadStyleEncoding", encoding_name=f"{n}.ipadpt")[0] for n in "vh")
    assert torch.equal(call(node({"style0": vector})[0], texts["sdxl"]), call(node()[0], texts["sdxl"]))
    with pytest.raises(ValueError, match="what it does without a picture is not known"):
        node({"style0": patches}, kind="plus")
    assert node({"style0": patches}, kind="plus", negative=encode(2))
    with pytest.raises(ValueError, match="a file that holds image_embeds only"):
        node({"style0": vector}, kind="plus")


def test_noise_for_the_negative_side(run_node, vision, node, texts):
    image = torch.rand(1, 300, 200, 3, generator=torch.Generator().manual_seed(9))
    noise = run_node("StyleLoomNoiseNegative", kind="dissolve", strength=0.5, blur=3, seed=1, image=image, position="top")[0]
    assert noise.shape == (1, 224, 224, 3)
    negative = encoded(run_node, vision, noise)
    made = call(node(negative=negative)[0], texts["sdxl"])
    assert not close(made, call(node()[0], texts["sdxl"]))


# --- converted workflows


def load_convert():
    if "styleloom_convert" not in sys.modules:
        folder = ROOT / "workflows" / "convert"
        spec = importlib.util.spec_from_file_location("styleloom_convert", folder / "__init__.py",
                                                      submodule_search_locations=[str(folder)])  # fmt: skip
        sys.modules["styleloom_convert"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["styleloom_convert"])
    return importlib.import_module("styleloom_convert.command")


FIXTURES = sorted((ROOT / "tests" / "unit" / "workflows_of_ipadapter_plus").glob("api_*.json"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_the_host_accepts_a_converted_workflow(path, host, request):
    import execution

    prompt, words, left = load_convert().convert(json.loads(path.read_text(encoding="utf-8")))
    assert left == 0, words
    files = {"ckpt_name": "checkpoints", "clip_name": "clip_vision", "ipadapter_name": "ipadapter",
             "encoding_name": "style_encodings"}  # fmt: skip
    for entry in prompt.values():
        for name, folder in files.items():
            if name in entry["inputs"]:
                file = host.base / "models" / folder / entry["inputs"][name]
                file.parent.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    file.touch()
                    request.addfinalizer(file.unlink)  # other tests look at what there is
    host.folder_paths.filename_list_cache.clear()
    valid, error, _, errors = asyncio.run(execution.validate_prompt("1", prompt, None))
    assert valid and not errors, (error, errors)


def test_the_shapes_of_our_nodes(host):
    """What the converter writes into the editor's form is what the schemas say."""
    shapes = importlib.import_module(f"{load_convert().__package__}.our_nodes").SHAPES
    for kind, shape in shapes.items():
        info = host.nodes[kind].GET_NODE_INFO_V1() if hasattr(host.nodes[kind], "GET_NODE_INFO_V1") else None
        given = host.nodes[kind].INPUT_TYPES()
        inputs = {**given.get("required", {}), **given.get("optional", {})}
        sockets, widgets = [], []
        for name, entry in inputs.items():
            of = entry[0] if isinstance(entry[0], str) else "COMBO"
            (widgets if of in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN") else sockets).append((name, of))
        own = [(name, "COMFY_AUTOGROW_V3" if of == "GROWING" else of) for name, of, _ in shape.sockets]
        assert own == sockets and [(name, of) for name, of, _ in shape.widgets] == widgets, kind
        for name, of, default in shape.widgets:
            options = inputs[name][1] if len(inputs[name]) > 1 else {}
            assert of == "COMBO" or default == options.get("default", default)
            choices = options.get("options") if of == "COMBO" else None
            assert not choices or default in choices or default == ""
        if info:
            assert [of for _, of in shape.outputs] == list(info["output"])
            assert [name for name, _ in shape.outputs] == list(info["output_name"])
