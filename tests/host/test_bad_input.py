"""What an artist sees when something does not fit: the words name the file and say what to do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file


def refused(run, words, *args, **kwargs):
    """The pack as the host loaded it has an exception class of its own, so it is known by its name."""
    with pytest.raises(ValueError, match=words) as error:
        run(*args, **kwargs)
    assert type(error.value).__name__ == "StyleLoomError"
    assert error.value.fix and error.value.expected
    return str(error.value)


@pytest.fixture(scope="module")
def folder(host):
    path = host.base / "models" / "i2l" / "bad"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def kit_file(host):
    return lambda name: host.base / "models" / "i2l" / "kit" / f"{name}.safetensors"


def open_encoders(run_node, siglip="kit/siglip2_small.safetensors", dino="kit/dinov3_small.safetensors"):
    return run_node("StyleLoomLoadImageEncoders", siglip_name=siglip, dino_name=dino, precision="bf16")[0]


@pytest.fixture(scope="module")
def encoders(run_node):
    return open_encoders(run_node)


def encode(run_node, encoders, *batches, **kwargs):
    return run_node(
        "StyleLoomEncodeReferences",
        encoders=[encoders],
        images={f"image{i}": [b] for i, b in enumerate(batches)},
        **kwargs,
    )[0]


@pytest.mark.parametrize("name", ["../kit/z_image_i2l.safetensors", "/etc/passwd", "none.safetensors", "kit/../x", ""])
def test_names_outside_the_lists(name, run_node):
    refused(run_node, "is not there", "StyleLoomLoadPredictor", predictor_name=name)
    refused(run_node, "is not there", "StyleLoomLoadReferences", references_name=name)
    refused(run_node, "is not there", "StyleLoomLoadLoRA", lora_name=name)


@pytest.mark.parametrize("prefix", ["../escaped", "/tmp/escaped", "a/../../b", "", "loras/", "C:\\x"])
def test_saves_stay_in_the_output_folder(prefix, run_node, host):
    lora = {"diffusion_model.x.lora_A.weight": torch.ones(1, 1), "diffusion_model.x.lora_B.weight": torch.ones(1, 1)}
    refused(run_node, "filename_prefix", "StyleLoomSaveLoRA", lora=lora, filename_prefix=prefix)
    assert not list(host.base.glob("escaped*"))


def test_wrong_file_in_each_slot(run_node, host, encoders):
    words = refused(
        run_node, "SigLIP2-G384 image encoder", "StyleLoomLoadPredictor", predictor_name="kit/siglip2_small.safetensors"
    )
    assert "kit/siglip2_small.safetensors" in words or "siglip2_small.safetensors" in words
    refused(open_encoders, "swapped", run_node, "kit/dinov3_small.safetensors", "kit/siglip2_small.safetensors")
    refused(open_encoders, "[Pp]redictor", run_node, "kit/z_image_i2l.safetensors")
    refused(run_node, "this is no LoRA", "StyleLoomLoadLoRA", lora_name=_as_lora(host, "siglip2_small"))
    references = encode(run_node, encoders, torch.rand(1, 9, 9, 3))
    run_node("StyleLoomSaveReferences", references=references, filename_prefix="ok")
    target = host.base / "models" / "i2l_references"
    target.mkdir(exist_ok=True)
    (target / "predictor.safetensors").write_bytes((host.base / "models/i2l/kit/z_image_i2l.safetensors").read_bytes())
    refused(run_node, "this is an i2L v1 predictor", "StyleLoomLoadReferences", references_name="predictor.safetensors")


def _as_lora(host, name):
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.safetensors").write_bytes((host.base / "models/i2l/kit" / f"{name}.safetensors").read_bytes())
    return f"{name}.safetensors"


def test_truncated_lying_and_poisoned_files(run_node, folder, kit_file, encoders):
    whole = kit_file("z_image_i2l").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-1000])
    refused(run_node, "cut.safetensors: truncated", "StyleLoomLoadPredictor", predictor_name="bad/cut.safetensors")
    (folder / "lies.safetensors").write_bytes(whole.replace(b'"shape":[', b'"shape":[9', 1)[: len(whole) + 1])
    refused(run_node, "lies.safetensors", "StyleLoomLoadPredictor", predictor_name="bad/lies.safetensors")

    for name, key, slot in (
        ("z_image_i2l", "layers_lora.blocks.40.layers.1.proj_a.proj_in.weight", "predictor"),
        ("siglip2_small", "encoder.layers.1.mlp.fc1.weight", "siglip"),
        ("dinov3_small", "norm.weight", "dino"),
    ):
        tensors = load_file(str(kit_file(name)))
        tensors[key].view(-1)[7] = float("nan")
        save_file(tensors, str(folder / f"nan_{slot}.safetensors"))
    predictor = run_node("StyleLoomLoadPredictor", predictor_name="bad/nan_predictor.safetensors")[0]
    references = encode(run_node, encoders, torch.rand(1, 9, 9, 3))
    words = refused(run_node, "NaN", "StyleLoomImageToLoRA", predictor=predictor, references=references)
    assert "nan_predictor.safetensors" in words and "layers_lora.blocks.40.layers.1.proj_a.proj_in.weight" in words
    for slots in ({"siglip": "bad/nan_siglip.safetensors"}, {"dino": "bad/nan_dino.safetensors"}):
        poisoned = open_encoders(run_node, **slots)
        words = refused(encode, "not numbers|NaN|not finite", run_node, poisoned, torch.rand(1, 9, 9, 3))
        assert next(iter(slots.values())) in words


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(0, 8, 8, 3), "image0 is \\[0, 8, 8, 3\\]: it holds no picture"),
        (torch.zeros(1, 0, 8, 3), "shape"),
        (torch.zeros(8, 8, 3), "it holds no picture"),
        (torch.zeros(1, 8, 8, 2), "channels"),
        (torch.full((1, 8, 8, 3), float("nan")), "not finite"),
    ],
)
def test_pictures_that_are_none(image, words, run_node, encoders):
    refused(encode, words, run_node, encoders, image)


def test_no_picture_at_all(run_node, encoders):
    refused(run_node, "no reference picture", "StyleLoomEncodeReferences", encoders=[encoders], images={})
    refused(run_node, "empty batch", "StyleLoomGrayReferences", images=torch.zeros(0, 4, 4, 3))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 1, 64, 3), (1, 4096, 2048, 3), (1, 30, 20, 4), (1, 30, 20, 1)])
def test_odd_pictures_are_taken(shape, run_node, encoders):
    image = torch.rand(1, 1, 1, shape[3]).expand(shape) if shape[1] > 1000 else torch.rand(shape)
    made = encode(run_node, encoders, image)
    assert len(made) == 1 and bool(made.embeddings.isfinite().all())


def test_values_beyond_the_range_are_clamped(run_node, encoders):
    bright = encode(run_node, encoders, torch.full((1, 8, 8, 3), 7.5))
    assert bright.images == encode(run_node, encoders, torch.ones(1, 8, 8, 3)).images


def test_residual_is_asked_for(run_node, encoders):
    references = encode(run_node, encoders, torch.rand(1, 9, 9, 3))
    for kind in ("coarse", "fine"):
        predictor = run_node("StyleLoomLoadPredictor", predictor_name=f"kit/qwen_image_i2l_{kind}.safetensors")[0]
        words = refused(
            run_node, f"residual_{kind}", "StyleLoomImageToLoRA", predictor=predictor, references=references
        )
        assert "Connect Qwen-Image's CLIP" in words


@pytest.mark.parametrize("architecture", ["z-image", "sdxl"])
def test_another_clip_for_the_residual(architecture, run_node, encoders):
    clip = run_node("StyleLoomKitModel", architecture=architecture, seed=0)[1]
    refused(encode, "Qwen-Image's text encoder", run_node, encoders, torch.rand(1, 9, 9, 3), clip=[clip])


def test_a_qwen_clip_without_its_vision_part(run_node, encoders):
    clip = run_node("StyleLoomKitModel", architecture="qwen-image", seed=0)[1]
    del clip.cond_stage_model.qwen25_7b.transformer.visual
    refused(encode, "it has no vision part", run_node, encoders, torch.rand(1, 9, 9, 3), clip=[clip])


def test_predictors_that_do_not_belong_together(run_node, encoders):
    load = lambda name: run_node("StyleLoomLoadPredictor", predictor_name=f"kit/{name}.safetensors")[0]  # noqa: E731
    style, fine, z = load("qwen_image_i2l_style"), load("qwen_image_i2l_fine"), load("z_image_i2l")
    references = encode(run_node, encoders, torch.rand(1, 9, 9, 3))
    run = lambda **kw: run_node("StyleLoomImageToLoRA", references=references, **kw)  # noqa: E731
    refused(run, "predictor_fine is kit/qwen_image_i2l_style", predictor=style, predictor_fine=style)
    refused(run, "both predictors are Fine", predictor=fine, predictor_fine=fine)
    refused(run, "two predictors for one base model", predictor=z, predictor_fine=fine)
    refused(run, "2 numbers for 1 pictures", predictor=z, image_weights="1 2")


def test_references_of_other_encoders(run_node, pack, encoders):
    references = encode(run_node, encoders, torch.rand(1, 9, 9, 3))
    import dataclasses

    wider = dataclasses.replace(references, embeddings=torch.zeros(1, 5632))
    predictor = run_node("StyleLoomLoadPredictor", predictor_name="kit/z_image_i2l.safetensors")[0]
    refused(run_node, r"references are \[1, 5632\]", "StyleLoomImageToLoRA", predictor=predictor, references=wider)


def test_lora_for_another_model(run_node, encoders, kit):
    references = encode(run_node, encoders, torch.rand(1, 9, 9, 3))
    predictor = run_node("StyleLoomLoadPredictor", predictor_name="kit/z_image_i2l.safetensors")[0]
    lora = run_node("StyleLoomImageToLoRA", predictor=predictor, references=references)[0]
    for architecture in ("qwen-image", "sdxl"):
        model = kit.architectures.make_model(architecture, 0, short=True)
        words = refused(
            run_node, "476 of the LoRA's 476 keys find no place", "StyleLoomApplyLoRA", model=model, lora=lora
        )
        assert "diffusion_model.layers.0.attention.to_q.lora_A.weight" in words and model.patches == {}

    model = kit.architectures.make_model("z-image")
    apply = lambda each: run_node("StyleLoomApplyLoRA", model=model, lora=each)  # noqa: E731
    key = "diffusion_model.layers.5.attention.to_q.lora_{}.weight"
    refused(apply, "1 patches of the LoRA have another size", {**lora, key.format("A"): torch.ones(4, 64)})
    refused(apply, "1 patches of the LoRA have another size", {**lora, key.format("B"): torch.ones(300, 4)})
    refused(apply, "1 patches of the LoRA are incomplete", {k: v for k, v in lora.items() if k != key.format("B")})
    refused(
        apply,
        "1 of the LoRA's 477 keys",
        {**lora, "diffusion_model.layers.99.attention.to_q.lora_A.weight": torch.ones(1)},
    )
    name, ones = "diffusion_model.layers.5.feed_forward.w1", torch.ones
    for kind, right, wrong in (
        ("diff", {"diff": ones(256, 96)}, {"diff": ones(96, 96)}),
        (
            "loha",
            dict.fromkeys(("hada_w1_a", "hada_w2_a"), ones(256, 2))
            | dict.fromkeys(("hada_w1_b", "hada_w2_b"), ones(2, 96)),
            dict.fromkeys(("hada_w1_a", "hada_w2_a"), ones(250, 2))
            | dict.fromkeys(("hada_w1_b", "hada_w2_b"), ones(2, 96)),
        ),
        ("lokr", {"lokr_w1": ones(4, 4), "lokr_w2": ones(64, 24)}, {"lokr_w1": ones(4, 4), "lokr_w2": ones(24, 64)}),
        ("oft", {"oft_blocks": ones(16, 16, 16)}, {"oft_blocks": ones(12, 16, 16)}),
        ("boft", {"oft_blocks": ones(2, 64, 4, 4)}, {"oft_blocks": ones(2, 32, 4, 4)}),
        (
            "glora",
            {"a1.weight": ones(96, 2), "a2.weight": ones(2, 96), "b1.weight": ones(256, 2), "b2.weight": ones(2, 96)},
            {"a1.weight": ones(96, 2), "a2.weight": ones(2, 96), "b1.weight": ones(250, 2), "b2.weight": ones(2, 96)},
        ),
    ):
        assert "1 of 1" in apply({f"{name}.{key}": value for key, value in right.items()})[2], kind
        refused(
            apply, "1 patches of the LoRA have another size", {f"{name}.{key}": value for key, value in wrong.items()}
        )
    refused(apply, "Connect clip", {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(1, 1)})


def test_a_lora_with_biases_and_text_parts(run_node):
    """What trainers other than ours write: full differences with biases, kohya names, parts for the text encoder."""
    model, clip, _ = run_node("StyleLoomKitModel", architecture="z-image", seed=0)
    bias = dict(model.model.named_parameters())["diffusion_model.cap_embedder.1.bias"]
    stem = "diffusion_model.cap_embedder.1"
    apply = lambda lora, **kw: run_node("StyleLoomApplyLoRA", model=model, lora=lora, **kw)  # noqa: E731
    patched = apply({f"{stem}.diff_b": torch.ones_like(bias)})[0]
    assert f"{stem}.bias" in patched.patches
    size = "1 patches of the LoRA have another size"
    refused(apply, f"{size}.*cap_embedder.1.bias", {f"{stem}.diff_b": torch.ones(len(bias) + 1)})
    refused(
        apply,
        "there is no diffusion_model.layers.0.feed_forward.w1.bias",
        {"diffusion_model.layers.0.feed_forward.w1.diff_b": torch.ones(256)},
    )

    model, clip, _ = run_node("StyleLoomKitModel", architecture="sdxl", seed=0)
    te = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    fc1 = clip.cond_stage_model.state_dict()["clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"]
    unet = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_q"
    to_q = model.model.state_dict()["diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"]
    lora = {
        f"{unet}.lora_up.weight": torch.ones(to_q.shape[0], 2),
        f"{unet}.lora_down.weight": torch.ones(2, to_q.shape[1]),
        f"{unet}.alpha": torch.tensor(1.0),
        f"{te}.lora_up.weight": torch.ones(fc1.shape[0], 2),
        f"{te}.lora_down.weight": torch.ones(2, fc1.shape[1]),
        f"{te}.alpha": torch.tensor(1.0),
    }
    patched, _, report = apply(lora)
    assert len(patched.patches) == 1 and "left out: 3 keys are for a text encoder: connect clip" in report
    patched, patched_clip, report = apply(lora, clip=clip, strength=0.5, strength_clip=0.25)
    assert len(patched.patches) == 1 and len(patched_clip.patcher.patches) == 1 and not clip.patcher.patches
    assert "1 of 2 patches on SDXL" in report and "1 patches on the text encoder at strength 0.25" in report
    refused(
        apply, "1 patches of the LoRA have another size", {**lora, f"{te}.lora_up.weight": torch.ones(3, 2)}, clip=clip
    )


def test_broken_loras(run_node, host):
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file(
        {"a.lora_A.weight": torch.full((1, 2), float("inf")), "a.lora_B.weight": torch.ones(2, 1)},
        str(folder / "inf.safetensors"),
    )
    refused(run_node, "'a.lora_A.weight' holds NaN or infinity", "StyleLoomLoadLoRA", lora_name="inf.safetensors")
    (folder / "page.safetensors").write_bytes(b"<html>not found</html>" * 9)
    refused(run_node, "a web page", "StyleLoomLoadLoRA", lora_name="page.safetensors")
    torch.save({"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}, str(folder / "old.pt"))
    assert len(run_node("StyleLoomLoadLoRA", lora_name="old.pt")[0]) == 2
    refused(run_node, "empty", "StyleLoomSaveLoRA", lora={})
    refused(run_node, "fp16", "StyleLoomSaveLoRA", lora={"a.lora_A.weight": torch.full((1, 1), 1e6)}, precision="fp16")


def test_a_new_node_starts_with_a_file_that_fits(run_node, host):
    """The first of a drop-down is what a new node shows; files of another kind come after, and none is left out."""
    offered = {}
    for node, field in (
        ("StyleLoomLoadPredictor", "predictor_name"),
        ("StyleLoomLoadImageEncoders", "siglip_name"),
        ("StyleLoomLoadImageEncoders", "dino_name"),
    ):
        offered[field] = host.nodes[node].INPUT_TYPES()["required"][field][1]["options"]
    marks = {"predictor_name": b"proj_a.proj_in", "siglip_name": b"head.probe", "dino_name": b"mlp.gate_proj"}
    for field, mark in marks.items():
        assert mark in (host.base / "models" / "i2l" / offered[field][0]).read_bytes()
    assert len({frozenset(names) for names in offered.values()}) == 1
    assert not any("\\" in name for names in offered.values() for name in names)


class _Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_is_refused(run_node, host, capsys):
    import pickle

    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    torch.save({"a.lora_A.weight": _Evil()}, str(folder / "evil.pt"))
    with pytest.raises(pickle.UnpicklingError):
        run_node("StyleLoomLoadLoRA", lora_name="evil.pt")
    assert "must never run" not in capsys.readouterr().out


@pytest.mark.parametrize("node", ["encode", "predict"])
def test_interrupt_leaves_nothing_behind(node, host, run_node, encoders):
    management = host.comfy.model_management
    references = encode(run_node, encoders, torch.rand(1, 9, 9, 3))
    predictor = run_node("StyleLoomLoadPredictor", predictor_name="kit/z_image_i2l.safetensors")[0]
    fresh = open_encoders(run_node)
    run = {
        "encode": lambda: encode(run_node, fresh, torch.rand(1, 12, 9, 3)),
        "predict": lambda: run_node("StyleLoomImageToLoRA", predictor=predictor, references=references),
    }[node]
    loaded = len(management.current_loaded_models)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        run()
    management.cleanup_models()
    assert len(management.current_loaded_models) == loaded
    assert run() is not None
