"""The kit keeps its promises: true layer counts and names, real tokenizers, sampling that neither dies nor explodes."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re

import pytest
import torch

PUBLISHED_HASHES = {  # MD5 over names and shapes, as the publisher's own loader registers them
    "qwen style": "0aad514690602ecaff932c701cb4b0bb",
    "qwen coarse": "a166c33455cdbd89c0888a3645ca5c0f",
    "qwen fine": "a5476e691767a4da6d3a6634a10f7408",
    "z-image 128": "9510cb8cd1dd34ee0e4f111c24905510",
    "z-image 64": "4f04fa4db33673882c675f426bf42602",
    "z-image 256": "cd7427f65cd4cc8092c00c373e2e0a23",
    "siglip2": "469c78b61e3e31bc9eec0d0af3d3f2f8",
    "dinov3": "5722b5c873720009de96422993b15682",
}
ARCHITECTURES = ("z-image", "qwen-image", "sdxl", "sd1.5", "flux2")
NODES = {"StyleLoomKitModel", "StyleLoomKitVision", "StyleLoomKitPictures", "StyleLoomKitLoRAPicture",
         "StyleLoomKitCompare"}


@pytest.fixture(scope="module")
def made(bare_host):
    """Each architecture once, through the node: name → (MODEL, CLIP, VAE)."""
    return {name: bare_host.run("StyleLoomKitModel", architecture=name, seed=0) for name in ARCHITECTURES}


def _weights(model) -> dict[str, torch.Tensor]:
    return dict(model.model.state_dict())


def _latent(model, pixels: int) -> torch.Tensor:
    form = model.model.latent_format
    side = pixels // form.spacial_downscale_ratio
    frames = (1,) if form.latent_dimensions == 3 else ()
    return torch.zeros((1, form.latent_channels, *frames, side, side))


@pytest.fixture(scope="module")
def encoded(bare_host, made):
    """(architecture, text) → CONDITIONING; each is made once."""
    known = {}

    def get(name, text):
        if (name, text) not in known:
            known[name, text] = bare_host.run("CLIPTextEncode", clip=made[name][1], text=text)[0]
        return known[name, text]

    return get


@pytest.fixture(scope="module")
def sample(bare_host, encoded):
    """Stock nodes only; returns latents in the model's own space, where a trained model's are of size one."""

    def sampled(name, model, text="a red fox in the snow", seed=0, steps=1, pixels=64) -> torch.Tensor:
        (latent,) = bare_host.run(
            "KSampler", model=model, seed=seed, steps=steps, cfg=4.0, sampler_name="euler", scheduler="simple",
            positive=encoded(name, text), negative=encoded(name, ""), denoise=1.0,
            latent_image={"samples": _latent(model, pixels)})
        return model.model.latent_format.process_in(latent["samples"])

    return sampled


# --- key lists and files ---------------------------------------------------------------------------------------------


def test_key_lists_reproduce_the_published_hashes(kit):
    k = kit.key_lists
    found = {
        "qwen style": k.predictor_keys("qwen-image", compress=64),
        "qwen coarse": k.predictor_keys("qwen-image", compress=128, residual="coarse"),
        "qwen fine": k.predictor_keys("qwen-image", compress=128, residual="fine"),
        "z-image 128": k.predictor_keys("z-image", compress=128),
        "z-image 64": k.predictor_keys("z-image", compress=64),
        "z-image 256": k.predictor_keys("z-image", compress=256),
        "siglip2": k.siglip2_keys(),
        "dinov3": k.dinov3_keys(),
    }
    assert {name: k.key_hash(keys) for name, keys in found.items()} == PUBLISHED_HASHES


def test_key_lists_have_the_published_counts(kit):
    k = kit.key_lists
    assert [len(k.leaves(f)) for f in ("z-image", "qwen-image")] == [238, 720]
    sizes = {}
    for name, keys in {"z": k.predictor_keys("z-image", compress=128),
                       "style": k.predictor_keys("qwen-image", compress=64),
                       "coarse": k.predictor_keys("qwen-image", compress=128, residual="coarse"),
                       "fine": k.predictor_keys("qwen-image", compress=128, residual="fine"),
                       "siglip2": k.siglip2_keys(), "dinov3": k.dinov3_keys()}.items():
        sizes[name] = len(keys), sum(math.prod(shape) for shape in keys.values())
    assert sizes == {"z": (952, 1_613_234_176), "style": (2880, 2_406_481_920), "coarse": (3360, 7_927_234_560),
                     "fine": (3360, 7_573_340_160), "siglip2": (656, 1_163_659_776), "dinov3": (687, 6_716_035_072)}


def test_files_are_written_once_and_whole(kit, tmp_path):
    names = [n for n in kit.files.FILES if "fine" not in n and "coarse" not in n]
    kit.files.ensure_files(tmp_path)
    first = {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in kit.files.FILES}
    assert kit.files.ensure_files(tmp_path) == []
    cut, other = tmp_path / names[0], tmp_path / names[1]
    cut.write_bytes(cut.read_bytes()[:-2])
    other.write_bytes(other.read_bytes().replace(b"write_predictor", b"write_preDictor", 1))
    assert kit.files.ensure_files(tmp_path) == [cut, other]
    assert {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in kit.files.FILES} == first
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".part"]
    assert sum((tmp_path / n).stat().st_size for n in kit.files.FILES) < 100e6


def test_the_host_lists_the_files(bare_host, kit):
    paths = bare_host.folder_paths
    assert "kit/flux2_small.safetensors" in paths.get_filename_list("diffusion_models")
    assert "kit/qwen_image_i2l_bias.safetensors" in paths.get_filename_list("loras")
    assert all((bare_host.base / "models" / name).is_file() for name in kit.files.FILES)


def test_predictor_files_have_their_keys_and_an_even_size(kit, tmp_path):
    from safetensors.torch import load_file

    path = kit.predictor_files.write_predictor(
        tmp_path / "p.safetensors", "z-image", 32, 64, compress=8, in_dim=24, rank=2, residual="coarse",
        residual_width=16, residual_mid=2, seed=3)
    tensors = load_file(path)
    keys = kit.key_lists.predictor_keys("z-image", 32, 64, compress=8, in_dim=24, rank=2, residual="coarse",
                                        residual_width=16, residual_mid=2)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == keys
    assert all(v.dtype == torch.bfloat16 and v.isfinite().all() and v.float().std() > 0 for v in tensors.values())


def _decode(kit, path, family, width, mlp, x) -> dict[str, torch.Tensor]:
    """The published formula for one image, written out: A = (rank, a_dim), B = (b_dim, rank)."""
    from safetensors.torch import load_file

    tensors = {k: v.double() for k, v in load_file(path).items()}
    lora = {}
    for leaf in kit.key_lists.leaves(family, width, mlp):
        a = tensors[f"{leaf.stem}.proj_a.proj_out.weight"] @ (tensors[f"{leaf.stem}.proj_a.proj_in.weight"] @ x)
        b = tensors[f"{leaf.stem}.proj_b.proj_out.weight"] @ (tensors[f"{leaf.stem}.proj_b.proj_in.weight"] @ x)
        lora[f"diffusion_model.{leaf.target}.lora_A.weight"] = a.reshape(-1, leaf.a_dim).float()
        lora[f"diffusion_model.{leaf.target}.lora_B.weight"] = b.reshape(leaf.b_dim, -1).float()
    return lora


@pytest.mark.parametrize("name, file, family, width, mlp, count", [
    ("z-image", "z_image_i2l", "z-image", 96, 256, 238),
    ("qwen-image", "qwen_image_i2l_style", "qwen-image", 32, 128, 720)])
def test_lora_targets_map_and_move_the_picture(bare_host, kit, made, sample, name, file, family, width, mlp, count):
    import comfy.lora

    model = made[name][0]
    mapped = comfy.lora.model_lora_keys_unet(model.model, {})
    targets = [leaf.target for leaf in kit.key_lists.leaves(family, width, mlp)]
    assert len(targets) == count
    assert [t for t in targets if f"diffusion_model.{t}" not in mapped] == []

    x = torch.randn(kit.files.IN_DIM, generator=torch.Generator().manual_seed(1)).double()
    lora = _decode(kit, bare_host.base / f"models/i2l/kit/{file}.safetensors", family, width, mlp, x)
    weights, shares = _weights(model), []
    for target in targets:
        key = mapped[f"diffusion_model.{target}"]
        weight = weights[key] if isinstance(key, str) else weights[key[0]].narrow(*key[1])
        delta = lora[f"diffusion_model.{target}.lora_B.weight"] @ lora[f"diffusion_model.{target}.lora_A.weight"]
        assert delta.shape == weight.shape, target
        shares.append(float(delta.norm() / weight.norm()))
    assert 0.03 < min(shares) and max(shares) < 0.6 and 0.1 < sorted(shares)[count // 2] < 0.25

    (with_lora,) = bare_host.run("LoraModelLoader", model=model, lora=lora, strength_model=1.0)
    assert len(with_lora.patches) == len({k if isinstance(k, str) else k[0] for k in
                                          (mapped[f"diffusion_model.{t}"] for t in targets)})
    plain, moved = sample(name, model, steps=2), sample(name, with_lora, steps=2)
    assert moved.isfinite().all()
    assert 0.02 < float((moved - plain).std() / plain.std()) < 1.5


# --- models ----------------------------------------------------------------------------------------------------------


def test_layer_counts_are_the_real_ones(made):
    z = _weights(made["z-image"][0])
    for part, count in (("layers", 30), ("context_refiner", 2), ("noise_refiner", 2)):
        assert len({k for k in z if re.fullmatch(rf"diffusion_model\.{part}\.\d+\.attention\.qkv\.weight", k)}) == count
    assert z["diffusion_model.layers.0.attention.qkv.weight"].shape == (3 * 96, 96)
    assert z["diffusion_model.layers.0.feed_forward.w1.weight"].shape == (256, 96)
    qwen = _weights(made["qwen-image"][0])
    assert len({k for k in qwen if k.endswith(".attn.to_q.weight")}) == 60
    assert qwen["diffusion_model.transformer_blocks.59.img_mod.1.weight"].shape == (6 * 32, 32)
    for name, count in (("sdxl", 70), ("sd1.5", 16)):
        assert len({k for k in _weights(made[name][0]) if k.endswith("attn2.to_v.weight")}) == count
    flux = _weights(made["flux2"][0])
    assert len({k for k in flux if k.endswith("img_attn.qkv.weight")}) == 2
    assert len({k for k in flux if k.endswith("linear1.weight")}) == 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_depend_on_seed_and_name_alone(kit, name):
    first, again, other = (_weights(kit.architectures.ARCHITECTURES[name].model(seed)) for seed in (0, 0, 1))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) and first[k].isfinite().all() for k in first)
    drawn = [k for k in first if k.startswith("diffusion_model.") and first[k].ndim > 1]
    assert drawn and all(not torch.equal(first[k], other[k]) for k in drawn)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampling_is_finite_varied_and_repeatable(sample, made, name):
    model = made[name][0]
    latent = sample(name, model, steps=4)
    assert latent.isfinite().all()
    assert 0.2 < float(latent.std()) < 5.0 and float(latent.abs().max()) < 40.0
    one = sample(name, model)
    assert torch.equal(one, sample(name, model))
    assert not torch.equal(one, sample(name, model, seed=1))
    other = sample(name, model, text="a blue house by the sea")
    assert float((other - one).std() / one.std()) > 0.005


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vae_works_with_the_stock_nodes(bare_host, made, name):
    model, _, vae = made[name]
    form = model.model.latent_format
    small = torch.nn.functional.interpolate(
        torch.rand((1, 3, 3, 3), generator=torch.Generator().manual_seed(0)), (64, 96), mode="bilinear")
    image = (0.25 + 0.5 * small).movedim(1, -1)
    (latent,) = bare_host.run("VAEEncode", vae=vae, pixels=image)
    assert latent["samples"].shape == _latent(model, 64)[..., :1].expand(
        *_latent(model, 64).shape[:-1], 96 // form.spacial_downscale_ratio).shape
    (back,) = bare_host.run("VAEDecode", vae=vae, samples=latent)
    assert back.shape == image.shape and float((back - image).abs().mean()) < 0.02
    (noise,) = bare_host.run("VAEDecode", vae=vae, samples={"samples": form.process_out(torch.randn(
        _latent(model, 64).shape, generator=torch.Generator().manual_seed(0)))})
    assert noise.shape == (1, 64, 64, 3) and float(noise.std()) > 0.02 and 0.0 <= noise.min() <= noise.max() <= 1.0


def test_stock_loader_takes_the_flux2_file(bare_host, made, sample):
    import comfy.model_base

    (model,) = bare_host.run("UNETLoader", unet_name="kit/flux2_small.safetensors", weight_dtype="default")
    assert type(model.model) is comfy.model_base.Flux2
    from_file, seeded = _weights(model), _weights(made["flux2"][0])
    nets = [k for k in seeded if k.startswith("diffusion_model.")]
    assert all(torch.equal(from_file[k].float(), seeded[k].bfloat16().float()) for k in nets)
    assert sum(seeded[k].numel() for k in nets) == pytest.approx(8.2e6, rel=0.01)
    latent = sample("flux2", model, steps=4)
    assert latent.isfinite().all() and 0.2 < float(latent.std()) < 5.0


def test_kohya_lora_for_sdxl_reaches_every_layer(bare_host, kit, made, sample, tmp_path):
    import comfy.lora
    from safetensors.torch import load_file

    model = made["sdxl"][0]
    layers = kit.diffusion_files.kohya_layers(model, "attn2")
    assert len(layers) == 4 * 70
    lora = load_file(kit.lora_files.write_kohya_lora(tmp_path / "k.safetensors", layers, rank=4, alpha=2.0))
    (with_lora,) = bare_host.run("LoraModelLoader", model=model, lora=lora, strength_model=1.0)
    assert len(with_lora.patches) == len(layers)
    plain, moved = sample("sdxl", model), sample("sdxl", with_lora)
    assert moved.isfinite().all() and not torch.equal(moved, plain)


# --- text and vision towers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, width", [
    ("z-image", 64), ("qwen-image", 64), ("sdxl", 80), ("sd1.5", 32), ("flux2", 192)])
def test_tokenizers_are_the_real_ones(made, name, width):
    clip = made[name][1]
    text = "a red fox"
    tokens = clip.tokenize(text)
    ids = [t[0] for t in next(iter(tokens.values()))[0]]
    if name in ("sdxl", "sd1.5"):  # CLIP's vocabulary: start, "a", "red", "fox", end
        assert ids[:5] == [49406, 320, 736, 3240, 49407] and len(ids) == 77
    else:  # Qwen's: the words inside the chat template
        assert [64, 2518, 38835] == [i for i in ids if i in (64, 2518, 38835)][-3:] and 151644 in ids
    assert clip.encode_from_tokens_scheduled(tokens)[0][0].shape[-1] == width


@pytest.mark.parametrize("side, length", [(224, 71), (1036, 1376)])
def test_qwen_reads_pictures_at_the_published_lengths(kit, made, side, length):
    import comfy.utils

    clip = made["qwen-image"][1]
    hidden = []
    for subject in list(kit.pictures.SUBJECTS)[: 2 if side == 224 else 1]:
        image, _ = kit.pictures.load(subject)
        image = comfy.utils.common_upscale(image.movedim(-1, 1), side, side, "bicubic", "center").movedim(1, -1)
        with torch.inference_mode():
            hidden.append(clip.encode_from_tokens_scheduled(clip.tokenize("", images=[image.clamp(0, 1)]))[0][0])
    assert all(h.shape == (1, length, kit.diffusion.QWEN_TEXT) and h.isfinite().all() for h in hidden)
    if len(hidden) == 2:
        assert float(torch.nn.functional.cosine_similarity(hidden[0].flatten(), hidden[1].flatten(), dim=0)) < 0.9


def test_clip_vision_sees_pictures(bare_host, kit):
    vision = kit.vision.clip_vision_small()
    seen = []
    for subject in list(kit.pictures.SUBJECTS)[:2]:
        image, _ = kit.pictures.load(subject)
        (out,) = bare_host.run("CLIPVisionEncode", clip_vision=vision, image=image, crop="center")
        assert out.last_hidden_state.shape == out.penultimate_hidden_states.shape == (1, 257, 64)
        seen.append(out.image_embeds)
    assert seen[0].shape == (1, 32)
    assert float(torch.nn.functional.cosine_similarity(seen[0], seen[1])) < 0.95


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_nodes_are_there(bare_host):
    assert NODES == {n for n in bare_host.nodes if n.startswith("StyleLoomKit")}
    assert all(bare_host.nodes[n].CATEGORY == "StyleLoom/kit" for n in NODES)


def test_pictures_are_real_and_differ_in_size(bare_host, kit):
    images = [bare_host.run("StyleLoomKitPictures", name=name)[0] for name in kit.pictures.SUBJECTS]
    assert all(i.ndim == 4 and i.shape[0] == 1 and i.shape[-1] == 3 and i.std() > 0.02 for i in images)
    assert len({tuple(i.shape) for i in images}) >= 3
    with pytest.raises(ValueError, match="expected one of"):
        kit.pictures.load("no such thing")


def test_lora_picture_measures_the_change(bare_host, kit):
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for leaf in kit.key_lists.leaves("z-image", 96, 256):
        lora[f"diffusion_model.{leaf.target}.lora_A.weight"] = torch.randn(4, leaf.a_dim, generator=generator)
        lora[f"diffusion_model.{leaf.target}.lora_B.weight"] = torch.randn(leaf.b_dim, 4, generator=generator)
    image, text = bare_host.run("StyleLoomKitLoRAPicture", lora=lora)
    assert image.shape[2] >= 1000 and image.shape[-1] == 3 and len(image.unique()) > 50
    total = math.sqrt(sum(float((lora[k.replace("lora_A", "lora_B")].double() @ a.double()).norm()) ** 2
                          for k, a in lora.items() if "lora_A" in k))
    assert "238 targets" in text and "rank 4" in text and f"{total:.4g}" in text
    stem = "diffusion_model.layers.3.feed_forward.w2"
    a, b = lora[f"{stem}.lora_A.weight"], lora[f"{stem}.lora_B.weight"]
    assert kit.lora_picture.delta_norm(a, b) == pytest.approx(float((b.double() @ a.double()).norm()), rel=1e-12)
    with pytest.raises(ValueError, match="no A/B pairs"):
        bare_host.run("StyleLoomKitLoRAPicture", lora={"x": torch.zeros(1)})


def test_compare_tells_how_much(bare_host):
    a = torch.zeros(1, 32, 48, 3)
    a[:, :, 24:] = 1.0
    _, same = bare_host.run("StyleLoomKitCompare", image_a=a, image_b=a)
    sheet, text = bare_host.run("StyleLoomKitCompare", image_a=a, image_b=a * 0.5 + 0.25)
    assert "equal, bit by bit" in same
    assert "50.0 %" in text and sheet.shape[2] > 3 * 48
    with pytest.raises(ValueError, match="different shapes"):
        bare_host.run("StyleLoomKitCompare", image_a=a, image_b=a[:, :16])


def test_schemas_are_valid_for_the_frontend(bare_host):
    for name in NODES:
        info = bare_host.nodes[name].GET_NODE_INFO_V1()
        assert info["display_name"].startswith("Kit: ")
    assert asyncio.iscoroutinefunction(bare_host.kit.comfy_entrypoint)
