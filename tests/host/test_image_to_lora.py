"""Image-to-LoRA inside the real host: every target patched, every patched weight checked in float64."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

STRENGTH = 0.7
FAMILIES = {
    "z-image": ("kit/z_image_i2l.safetensors", 238),
    "qwen-image": ("kit/qwen_image_i2l_style.safetensors", 720),
}


def pictures(*sizes, seed=0):
    """The growing input of Encode References as the host gives it: lists of batches."""
    g = torch.Generator().manual_seed(seed)
    return {f"image{i}": [torch.rand(n, h, w, 3, generator=g)] for i, (n, h, w) in enumerate(sizes)}


@pytest.fixture(scope="module")
def encoders(run_node):
    return run_node(
        "StyleLoomLoadImageEncoders",
        siglip_name="kit/siglip2_small.safetensors",
        dino_name="kit/dinov3_small.safetensors",
        precision="bf16",
    )[0]


@pytest.fixture(scope="module")
def references(run_node, encoders):
    return run_node("StyleLoomEncodeReferences", encoders=[encoders], images=pictures((2, 64, 96), (1, 300, 40)))[0]


@pytest.fixture(scope="module")
def predictors(run_node):
    return {
        family: run_node("StyleLoomLoadPredictor", predictor_name=name)[0] for family, (name, _) in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def models(run_node):
    return {family: run_node("StyleLoomKitModel", architecture=family, seed=0) for family in FAMILIES}


@pytest.fixture(scope="module")
def loras(run_node, predictors, references):
    return {
        family: run_node(
            "StyleLoomImageToLoRA", predictor=predictor, references=references, strength=1.0, arithmetic="fp32"
        )[0]
        for family, predictor in predictors.items()
    }


def weights_of(patcher):
    return {key: value.detach().clone() for key, value in patcher.model.state_dict().items()}


def patched_weights(patcher):
    """What the host really computes with: patch, copy, unpatch."""
    patcher.patch_model(device_to=torch.device("cpu"))
    try:
        return weights_of(patcher)
    finally:
        patcher.unpatch_model(device_to=torch.device("cpu"))


# Where each target of the LoRA must land, written out here and not taken from the host's map: (weight, first row).
def landing(family, target, dim):
    if family == "z-image":
        for i, name in enumerate(("to_q", "to_k", "to_v")):
            if target.endswith(f".attention.{name}"):
                return target.replace(name, "qkv") + ".weight", i * dim
        target = target.replace("attention.to_out.0", "attention.out")
    return target + ".weight", 0


@pytest.mark.parametrize("loader", ["StyleLoomApplyLoRA", "LoraModelLoader"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_is_patched_exactly(family, loader, run_node, models, loras, predictors):
    model, lora = models[family][0], loras[family]
    dim = predictors[family].spec.widths["dim"]
    before = weights_of(model)
    strength = (
        {"strength": STRENGTH} if loader == "StyleLoomApplyLoRA" else {"strength_model": STRENGTH, "bypass": False}
    )
    after = patched_weights(run_node(loader, model=model, lora=lora, **strength)[0])

    expected = {key: value.double() for key, value in before.items()}
    targets = {key[len("diffusion_model.") : -len(".lora_A.weight")] for key in lora if key.endswith(".lora_A.weight")}
    assert len(targets) == FAMILIES[family][1]
    for target in targets:
        up, down = (lora[f"diffusion_model.{target}.lora_{x}.weight"].double() for x in "BA")
        key, row = landing(family, target, dim)
        delta = STRENGTH * (up @ down)
        assert delta.abs().max() > 0
        expected["diffusion_model." + key][row : row + delta.shape[0]] += delta
    moved = 0
    for key, value in expected.items():
        torch.testing.assert_close(after[key].double(), value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        moved += not torch.equal(after[key], before[key])
    # q, k and v share one weight in Z-Image.
    assert moved == (FAMILIES[family][1] if family == "qwen-image" else 34 * 5)
    assert all(torch.equal(value, before[key]) for key, value in weights_of(model).items())


def test_exactness_would_notice_swapped_targets(run_node, models, loras):
    """The test above has teeth: with q and k exchanged, the weights differ by far more than its tolerance."""
    lora = dict(loras["z-image"])
    for x in "AB":
        q, k = (f"diffusion_model.layers.3.attention.to_{n}.lora_{x}.weight" for n in "qk")
        lora[q], lora[k] = lora[k], lora[q]
    model = models["z-image"][0]
    right, wrong = (
        patched_weights(run_node("StyleLoomApplyLoRA", model=model, lora=each, strength=STRENGTH)[0])
        for each in (loras["z-image"], lora)
    )
    key = "diffusion_model.layers.3.attention.qkv.weight"
    assert (right[key] - wrong[key]).abs().max() > 1e-3


def test_the_input_model_and_lora_stay_as_they_are(run_node, models, loras):
    model, lora = models["z-image"][0], loras["z-image"]
    copies = {key: value.clone() for key, value in lora.items()}
    patched = run_node("StyleLoomApplyLoRA", model=model, lora=lora, strength=1.0)[0]
    assert patched is not model and model.patches == {} and len(patched.patches) == 34 * 5
    assert all(torch.equal(lora[key], value) for key, value in copies.items())
    assert run_node("StyleLoomApplyLoRA", model=model, lora=lora, strength=0.0)[0] is model


def test_same_in_same_out(run_node, encoders, references, predictors):
    fresh = run_node(
        "StyleLoomLoadImageEncoders",
        siglip_name="kit/siglip2_small.safetensors",
        dino_name="kit/dinov3_small.safetensors",
        precision="bf16",
    )[0]
    again = run_node("StyleLoomEncodeReferences", encoders=[fresh], images=pictures((2, 64, 96), (1, 300, 40)))[0]
    assert torch.equal(again.embeddings, references.embeddings) and again.images == references.images
    a, b = (
        run_node("StyleLoomImageToLoRA", predictor=predictors["z-image"], references=r, strength=1.0)
        for r in (references, again)
    )
    assert a[1] == b[1] and all(torch.equal(a[0][key], b[0][key]) for key in a[0])


def test_lists_batches_and_order_are_one_set(run_node, encoders, references):
    a, b = pictures((2, 64, 96), (1, 300, 40)).values()
    split = {"image0": [a[0][:1], a[0][1:]], "image1": b}
    assert torch.equal(
        run_node("StyleLoomEncodeReferences", encoders=[encoders], images=split)[0].embeddings, references.embeddings
    )
    # image10 comes after image2, as on the canvas.
    many = {f"image{i}": [torch.full((1, 8, 8, 3), i / 20)] for i in (0, 1, 10, 2)}
    ordered = run_node("StyleLoomEncodeReferences", encoders=[encoders], images=many)[0]
    last = run_node("StyleLoomEncodeReferences", encoders=[encoders], images={"image0": many["image10"]})[0]
    assert ordered.images[-1] == last.images[0]


def test_a_picture_seen_before_is_not_encoded_again(run_node, pack, monkeypatch):
    import sys

    towers = sys.modules[pack.__name__ + ".nodes.i2l_encoders"]
    runs = []
    original = towers.TowerRun.__call__
    monkeypatch.setattr(towers.TowerRun, "__call__", lambda self, *a: runs.append(self.file.kind) or original(self, *a))
    fresh = run_node(
        "StyleLoomLoadImageEncoders",
        siglip_name="kit/siglip2_small.safetensors",
        dino_name="kit/dinov3_small.safetensors",
        precision="bf16",
    )[0]
    images = pictures((2, 40, 40))
    first = run_node("StyleLoomEncodeReferences", encoders=[fresh], images=images)[0]
    assert runs == ["siglip2"] * 2 + ["dinov3"] * 2
    more = run_node(
        "StyleLoomEncodeReferences", encoders=[fresh], images={**images, **{"image1": [torch.zeros(1, 9, 9, 3)]}}
    )[0]
    assert runs == ["siglip2"] * 2 + ["dinov3"] * 2 + ["siglip2", "dinov3"]
    assert torch.equal(more.embeddings[:2], first.embeddings)


def test_more_pictures_than_the_cache_holds(run_node, pack, monkeypatch):
    """A run keeps the embeddings that it needs, also when the cache drops them while others are added."""
    fresh, plain = (
        run_node(
            "StyleLoomLoadImageEncoders",
            siglip_name="kit/siglip2_small.safetensors",
            dino_name="kit/dinov3_small.safetensors",
            precision="bf16",
        )[0]
        for _ in range(2)
    )
    images = pictures((3, 40, 40))
    want = run_node("StyleLoomEncodeReferences", encoders=[plain], images=images)[0]
    monkeypatch.setattr(type(fresh[0].seen), "LIMIT", 2)
    for _ in range(2):  # the second run finds some of them in the cache, and drops those while it adds the others
        found = run_node("StyleLoomEncodeReferences", encoders=[fresh], images=images)[0]
        assert torch.equal(found.embeddings, want.embeddings)
    assert all(len(file.seen) == 2 for file in fresh)


@pytest.mark.parametrize(("precision", "close"), [("fp8", 0.15), ("fp32", 0.02)])
def test_other_precisions_see_the_same(precision, close, run_node, references):
    encoders = run_node(
        "StyleLoomLoadImageEncoders",
        siglip_name="kit/siglip2_small.safetensors",
        dino_name="kit/dinov3_small.safetensors",
        precision=precision,
    )[0]
    other = run_node("StyleLoomEncodeReferences", encoders=[encoders], images=pictures((2, 64, 96), (1, 300, 40)))[0]
    difference = (
        other.embeddings.float() - references.embeddings.float()
    ).norm() / references.embeddings.float().norm()
    assert 0 < difference < close and precision in other.encoders["siglip"]


def test_encoders_leave_no_model_loaded(host, run_node, encoders):
    before = len(host.comfy.model_management.current_loaded_models)
    run_node("StyleLoomEncodeReferences", encoders=[encoders], images=pictures((1, 50, 50), seed=99))
    host.comfy.model_management.cleanup_models()
    assert len(host.comfy.model_management.current_loaded_models) == before


def test_gray_references(run_node, encoders):
    gray = run_node("StyleLoomGrayReferences", images=torch.rand(3, 10, 20, 4))[0]
    assert gray.shape == (3, 10, 20, 3) and torch.equal((gray * 255).round(), torch.full((3, 10, 20, 3), 128.0))
    made = run_node("StyleLoomEncodeReferences", encoders=[encoders], images={"image0": [gray]})[0]
    assert len(made) == 3 and torch.equal(made.embeddings[0], made.embeddings[2])


def test_weights_and_rank_cap(run_node, predictors, references, loras):
    run = lambda **kw: run_node(
        "StyleLoomImageToLoRA",
        predictor=predictors["z-image"],
        references=references,  # noqa: E731
        arithmetic="fp32",
        **kw,
    )[0]
    key = "diffusion_model.layers.7.feed_forward.w2.lora_{}.weight"
    delta = lambda lora: lora[key.format("B")].double() @ lora[key.format("A")].double()  # noqa: E731
    assert loras["z-image"][key.format("A")].shape[0] == 12
    one = run(strength=1.0, image_weights="0 1 0")
    assert one[key.format("A")].shape[0] == 4
    parts = [delta(run(strength=1.0, image_weights=w)) for w in ("1 0 0", "0 1 0", "0 0 1")]
    torch.testing.assert_close(
        delta(run(strength=2.0, image_weights="1, 1, 2")),
        2 * (parts[0] / 4 + parts[1] / 4 + parts[2] / 2),
        rtol=1e-5,
        atol=1e-5,
    )
    capped = run(strength=1.0, max_rank=5)
    u, s, v = torch.linalg.svd(delta(loras["z-image"]))
    torch.testing.assert_close(delta(capped), u[:, :5] * s[:5] @ v[:5], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def qwen(run_node, models, encoders):
    """Coarse, Fine and Bias, and references that hold what they read."""
    coarse, fine = (
        run_node("StyleLoomLoadPredictor", predictor_name=f"kit/qwen_image_i2l_{kind}.safetensors")[0]
        for kind in ("coarse", "fine")
    )
    bias = run_node("StyleLoomLoadLoRA", lora_name="kit/qwen_image_i2l_bias.safetensors")[0]
    seen = run_node(
        "StyleLoomEncodeReferences", encoders=[encoders], images=pictures((2, 70, 50)), clip=[models["qwen-image"][1]]
    )[0]
    return coarse, fine, bias, seen


def test_coarse_fine_and_bias_add_up(run_node, qwen, models):
    coarse, fine, bias, seen = qwen
    assert seen.residual_coarse.shape[:2] == (2, 71) and seen.residual_fine.shape[:2] == (2, 1376)
    run = lambda predictor, **kw: run_node(
        "StyleLoomImageToLoRA",
        predictor=predictor,
        references=seen,  # noqa: E731
        strength=1.0,
        arithmetic="fp32",
        **kw,
    )
    whole, report = run(coarse, predictor_fine=fine, bias_lora=bias)
    parts = run(coarse)[0], run(fine)[0]
    assert "warning: kit/qwen_image_i2l_fine" in run(fine)[1]
    name = "transformer_blocks.31.img_mod.1"
    key = f"diffusion_model.{name}.lora_{{}}.weight"
    assert whole[key.format("A")].shape[0] == 2 * 4 * 2 + bias[f"{name}.lora_A.default.weight"].shape[0]
    expected = sum(p[key.format("B")].double() @ p[key.format("A")].double() for p in parts)
    expected = (
        expected + bias[f"{name}.lora_B.default.weight"].double() @ bias[f"{name}.lora_A.default.weight"].double()
    )
    torch.testing.assert_close(
        whole[key.format("B")].double() @ whole[key.format("A")].double(), expected, rtol=1e-4, atol=1e-5
    )
    assert "+ bias" in report
    assert "720 of 720" in run_node("StyleLoomApplyLoRA", model=models["qwen-image"][0], lora=whole, strength=1.0)[2]
    # The bias is an ordinary LoRA file too.
    assert "720 of 720" in run_node("StyleLoomApplyLoRA", model=models["qwen-image"][0], lora=bias, strength=1.0)[2]


def test_saved_references_make_the_same_lora(run_node, host, qwen):
    coarse, _, _, seen = qwen
    run_node("StyleLoomSaveReferences", references=seen, filename_prefix="two/view")
    read = run_node("StyleLoomLoadReferences", references_name="two/view_00001_.safetensors")[0]
    a, b = (run_node("StyleLoomImageToLoRA", predictor=coarse, references=r, strength=1.0)[0] for r in (seen, read))
    assert all(torch.equal(a[key], b[key]) for key in a) and read.images == seen.images
    assert (host.base / "output/i2l_references/two/view_00001_.safetensors").is_file()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("as it is", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)],
)
def test_saved_lora_loads_in_the_host_and_names_its_recipe(precision, dtype, run_node, host, loras, models):
    import json

    path = run_node("StyleLoomSaveLoRA", lora=loras["z-image"], filename_prefix="loras/kept", precision=precision)[0]
    file = host.base / "output" / path
    with safe_open(str(file), "pt") as f:
        recipe = json.loads(f.metadata()["styleloom.recipe"])
    assert recipe["family"] == "z-image" and recipe["rank"] == 12 and len(recipe["images"]) == 3
    assert all(len(i["sha256"]) == 64 and i["weight"] == pytest.approx(1 / 3) for i in recipe["images"])
    assert (
        recipe["predictors"][0]["name"] == FAMILIES["z-image"][0] and len(recipe["predictors"][0]["fingerprint"]) == 64
    )
    assert {t.dtype for t in load_file(str(file)).values()} == {dtype}

    host.folder_paths.add_model_folder_path("loras", str(host.base / "output" / "loras"))
    name = path.replace("\\", "/").removeprefix("loras/")
    model = models["z-image"][0]
    stock = run_node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)[0]
    ours = run_node("StyleLoomLoadLoRA", lora_name=name)[0]
    assert ours.metadata["styleloom.recipe"] and len(stock.patches) == 34 * 5
    a, b = (
        patched_weights(stock),
        patched_weights(run_node("StyleLoomApplyLoRA", model=model, lora=ours, strength=1.0)[0]),
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_hosts_own_save_takes_it(run_node, host, loras):
    run_node("SaveLoRA", lora=loras["z-image"], prefix="loras/by_host")
    written = load_file(str(next((host.base / "output/loras").glob("by_host*"))))
    assert all(torch.equal(written[key], value) for key, value in loras["z-image"].items())


def test_sampling_moves_with_the_lora(run_node, models, loras):
    model, clip, _ = models["z-image"]
    positive, negative = (run_node("CLIPTextEncode", clip=clip, text=t)[0] for t in ("a red house", ""))
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    run = lambda m: run_node(
        "KSampler",
        model=m,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=1,  # noqa: E731
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )[0]["samples"]
    plain = run(model)
    with_lora = run(run_node("StyleLoomApplyLoRA", model=model, lora=loras["z-image"], strength=1.0)[0])
    assert bool(with_lora.isfinite().all()) and (with_lora - plain).norm() / plain.norm() > 1e-3
    assert torch.equal(run(model), plain)
