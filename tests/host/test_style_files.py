"""Load IP-Adapter and Encode Style Image: real files, wrong files, and what the encoder is shown."""

from __future__ import annotations

import dataclasses
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def folder(host):
    made = host.base / "models" / "ipadapter" / "files"
    made.mkdir(parents=True, exist_ok=True)
    return made


@pytest.fixture(scope="module")
def parts(kit):
    return lambda kind="base", model="sdxl", **o: kit.ip_adapter_files.ip_adapter_tensors(kind, model, seed=3, **o)


def load(run_node, name):
    return run_node("StyleLoomLoadIPAdapter", ipadapter_name=f"files/{name}")[0]


def flat(parts):
    return {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}


def refused(words, function, *args, **kwargs):
    with pytest.raises(ValueError, match=words) as error:
        function(*args, **kwargs)
    assert "Expected: " in str(error.value) and "What to do: " in str(error.value)
    return str(error.value)


def test_a_bin_and_a_safetensors_are_the_same(run_node, folder, parts):
    """The name says nothing: kinds are told apart by their contents."""
    for kind, width in (("base", 48), ("plus", 64), ("full", 64)):
        tensors = parts(kind, width=width)
        torch.save(tensors, str(folder / "ip-adapter-faceid_x.bin"))
        save_file(flat(tensors), str(folder / "ip-adapter_x.safetensors"))
        first, second = load(run_node, "ip-adapter-faceid_x.bin"), load(run_node, "ip-adapter_x.safetensors")
        assert first.kind == second.kind == kind and first.layers.keys() == second.layers.keys()
        assert all(torch.equal(a, b) for n in first.layers for a, b in zip(first.layers[n], second.layers[n]))
        assert all(torch.equal(first.projection[key], second.projection[key]) for key in tensors["image_proj"])


def test_the_list_offers_both_kinds_of_file(run_node, host, folder, parts):
    torch.save(parts(), str(folder / "one.bin"))
    options = host.nodes["StyleLoomLoadIPAdapter"].INPUT_TYPES()["required"]["ipadapter_name"][1]["options"]
    assert "files/one.bin" in options and "kit/ip_adapter_sdxl_small.safetensors" in options
    assert options.index("kit/ip_adapter_sdxl_small.safetensors") < options.index("files/one.bin")


class _Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_bin_with_code_is_refused(run_node, folder, parts, capsys):
    torch.save({**parts(), "more": _Evil()}, str(folder / "evil.bin"))
    with pytest.raises(pickle.UnpicklingError):
        load(run_node, "evil.bin")
    assert "must never run" not in capsys.readouterr().out


def test_wrong_files(run_node, folder, parts):
    whole = flat(parts())
    save_file(whole, str(folder / "cut.safetensors"))
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-100])
    refused("cut.safetensors: truncated", load, run_node, "cut.safetensors")
    (folder / "page.safetensors").write_bytes(b"<html>gated</html>" * 9)
    refused("a web page", load, run_node, "page.safetensors")
    save_file({"model.x": torch.ones(1)}, str(folder / "other.safetensors"))
    refused("this is no IP-Adapter", load, run_node, "other.safetensors")
    tensors = parts()
    tensors["ip_adapter"]["0.to_q_lora.down.weight"] = torch.ones(1)
    torch.save(tensors, str(folder / "ip-adapter_sdxl.bin"))
    assert "insightface" in refused("FaceID", load, run_node, "ip-adapter_sdxl.bin")
    refused("is not there", run_node, "StyleLoomLoadIPAdapter", ipadapter_name="../../x.bin")


def test_a_model_that_does_not_fit(run_node, folder, parts, models, encode, kit):
    inject = lambda model, adapter: run_node(  # noqa: E731
        "StyleLoomStyleBlockInjector", model=model, ipadapter=adapter, style={"style0": encode(1)}, preset="style",
        weight=1.0)  # fmt: skip
    save_file(flat(parts()), str(folder / "sdxl.safetensors"))
    save_file(flat(parts(channels=64)), str(folder / "wide.safetensors"))
    sdxl = load(run_node, "sdxl.safetensors")
    refused("model is SD1.5, and files/sdxl.safetensors is made for SDXL", inject, models["sd1.5"][0], sdxl)
    flux = kit.architectures.make_model("flux2")
    refused("model is Flux2 with 0 cross-attentions", inject, flux, sdxl)
    refused("makes 128 numbers, and .* is 64 wide", inject, models["sdxl"][0], load(run_node, "wide.safetensors"))


def test_models_of_the_same_blocks_and_another_text(run_node, folder, parts, models, adapters, encode, monkeypatch):
    """SD2 has the blocks and widths of SD1.5, and Kolors those of SDXL."""
    inject = lambda model, adapter: run_node(  # noqa: E731
        "StyleLoomStyleBlockInjector", model=model, ipadapter=adapter, style={"style0": encode(1)}, preset="style",
        weight=1.0)  # fmt: skip
    save_file(flat(parts("base", "sd1.5", cross=40)), str(folder / "other_text.safetensors"))
    other = load(run_node, "other_text.safetensors")
    words = refused("reads text that is 32 wide, and .* makes tokens of 40", inject, models["sd1.5"][0], other)
    assert "SD2" in words
    sdxl, base = models["sdxl"][0], adapters("base", "sdxl")[0]
    embed = sdxl.model.diffusion_model.label_emb[0][0]
    assert inject(sdxl, base)
    # Kolors' UNet is told 5632 numbers of sizes and text: in the host that is all that tells it from SDXL's.
    monkeypatch.setattr(embed, "in_features", 5632)
    refused("model is Kolors, and .* is made for SDXL", inject, sdxl, base)
    monkeypatch.undo()
    kolors = dataclasses.replace(base, encoder=sys.modules[type(base).__module__].VIT_L_336)
    refused("model is SDXL, and .* is made for Kolors", inject, sdxl, kolors)


def test_a_plus_layout_that_core_encoded(run_node, models, adapters, encode, vision):
    """The style input brings what the encoder sees in an empty picture; it is the same for the layout."""
    adapter = adapters("plus", "sdxl")[0]
    image = torch.rand(1, 40, 64, 3, generator=torch.Generator().manual_seed(2))
    core = run_node("CLIPVisionEncode", clip_vision=vision, image=image, crop="center")[0]
    ours = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image)[0]
    made = []
    for layout in (core, ours):
        model = run_node("StyleLoomStyleBlockInjector", model=models["sdxl"][0], ipadapter=adapter,
                         style={"style0": encode(1)}, preset="style + layout", weight=1.0, layout=layout)[0]  # fmt: skip
        layers = model.wrappers["apply_model"]["styleloom_style"][0].__self__.layers
        made.append(layers["input", 8, 3])
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_the_right_encoder_is_named(run_node, folder, parts, models, encode):
    """An adapter with the sizes of ViT-H, and pictures encoded by another tower."""
    import comfy.clip_vision

    inject = lambda adapter, **inputs: run_node(  # noqa: E731
        "StyleLoomStyleBlockInjector", model=models["sdxl"][0], ipadapter=adapter, preset="style", weight=1.0, **inputs
    )
    save_file(flat(parts(width=1024)), str(folder / "vit_h.safetensors"))
    adapter = load(run_node, "vit_h.safetensors")
    assert adapter.encoder.name == "ViT-H"
    words = refused("style was encoded by an encoder .width 64", inject, adapter, style={"style0": encode(1)})
    assert "CLIP-ViT-H-14" in words
    big_g, right = comfy.clip_vision.Output(), comfy.clip_vision.Output()
    big_g["image_embeds"], big_g["penultimate_hidden_states"] = torch.ones(1, 1280), torch.ones(1, 257, 1664)
    right["image_embeds"], right["penultimate_hidden_states"] = torch.ones(1, 1024), torch.ones(1, 257, 1280)
    refused("style was encoded by ViT-bigG", inject, adapter, style={"style0": big_g})
    refused("negative was encoded by ViT-bigG", inject, adapter, style={"style0": right}, negative=big_g)
    alike = comfy.clip_vision.Output()  # vectors as long as ViT-H's, and another encoder
    alike["image_embeds"], alike["penultimate_hidden_states"] = torch.ones(1, 1024), torch.ones(1, 257, 768)
    refused("style was encoded by an encoder .width 768", inject, adapter, style={"style0": alike})
    # Hidden states of ViT-H are as wide as bigG's vectors: sizes alone would let this pass.
    save_file(flat(parts(width=1280)), str(folder / "big_g.safetensors"))
    words = refused("encoded by ViT-H", inject, load(run_node, "big_g.safetensors"), style={"style0": right})
    assert "ViT-bigG-14" in words
    assert inject(adapter, style={"style0": right})


def test_inputs_that_say_nothing(run_node, models, adapters, encode, vision):
    inject = lambda **o: run_node("StyleLoomStyleBlockInjector", **({  # noqa: E731
        "model": models["sdxl"][0], "ipadapter": adapters("base", "sdxl")[0], "style": {"style0": encode(1)},
        "preset": "style", "weight": 1.0} | o))  # fmt: skip
    refused("style is not connected", inject, style={"style0": None})
    refused("start_percent is 0.7", inject, start_percent=0.7, end_percent=0.2)
    refused(r"mask is \[0, 8, 8\]", inject, mask=torch.ones(0, 8, 8))
    refused("mask has values that are not finite", inject, mask=torch.full((1, 8, 8), float("nan")))
    refused("block_weights is empty", inject, preset="custom")
    for image, words in ((torch.rand(0, 8, 8, 3), "image is"), (torch.rand(1, 8, 8, 1), "image is"),
                         (torch.full((1, 8, 8, 3), float("inf")), "not finite")):  # fmt: skip
        refused(words, run_node, "StyleLoomEncodeStyleImage", clip_vision=vision, image=image)
    plain = run_node("CLIPVisionEncode", clip_vision=vision, image=torch.rand(1, 8, 8, 3), crop="center")[0]
    words = refused("what it does without a picture", inject, ipadapter=adapters("plus", "sdxl")[0],
                    style={"style0": plain})  # fmt: skip
    assert "Encode Style Image" in words
    assert inject(ipadapter=adapters("plus", "sdxl")[0], style={"style0": plain}, negative=plain)


# --- what the encoder sees


@pytest.mark.parametrize("shape", [(1, 60, 60, 3), (3, 40, 90, 3), (9, 90, 40, 4)])
def test_crop_is_the_hosts_own(shape, run_node, vision):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    made = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image, fit="crop")[0]
    due = run_node("CLIPVisionEncode", clip_vision=vision, image=image, crop="center")[0]
    assert len(made.image_sizes) == shape[0] and made.mm_projected is None
    for name in ("image_embeds", "penultimate_hidden_states", "last_hidden_state"):
        assert torch.allclose(getattr(made, name), getattr(due, name), atol=1e-5)


def test_pad_shows_the_whole_picture_and_nothing_else(run_node, vision):
    """The borders are zeros for the encoder, up to the rounding to 8 bits that the host does with every picture."""
    seen = []
    handle = vision.model.vision_model.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0]), with_kwargs=True)  # fmt: skip
    try:
        image = torch.rand(1, 112, 224, 3, generator=torch.Generator().manual_seed(1))
        run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image, fit="pad")
    finally:
        handle.remove()
    pixels = seen[0]
    assert pixels.shape == (1, 3, 224, 224)
    assert float(pixels[:, :, :56].abs().max()) < 0.01 and float(pixels[:, :, 168:].abs().max()) < 0.01
    mean = torch.tensor(vision.image_mean)[:, None, None]
    std = torch.tensor(vision.image_std)[:, None, None]
    shown = pixels[0, :, 56:168] * std + mean
    assert torch.allclose(shown, image[0].movedim(-1, 0), atol=1 / 255)


@pytest.mark.parametrize(("height", "width", "starts"), [
    (50, 50, [0]), (50, 100, [0, 50]), (50, 60, [0, 10]), (130, 50, [0, 40, 80]), (50, 101, [0, 26, 51])])  # fmt: skip
def test_tiles_cover_the_picture(height, width, starts, run_node, vision):
    image = torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(1))
    made = run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=image, fit="tiles")[0]
    side = min(height, width)
    cut = [picture[None, s : s + side] if height > width else picture[None, :, s : s + side]
           for picture in image for s in starts]  # fmt: skip
    due = torch.cat([run_node("CLIPVisionEncode", clip_vision=vision, image=c, crop="none")[0].image_embeds
                     for c in cut])  # fmt: skip
    assert made.image_embeds.shape[0] == 2 * len(starts)
    assert torch.allclose(made.image_embeds, due, atol=1e-5)


def test_an_interrupt_while_encoding(run_node, vision, host):
    management = host.comfy.model_management
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=torch.rand(20, 30, 30, 3), fit="crop")
    assert run_node("StyleLoomEncodeStyleImage", clip_vision=vision, image=torch.rand(1, 30, 30, 3), fit="crop")
