"""Recognising encoder files, and building the towers around their tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l import dinov3, siglip2, tower_parts, towers
from torch import nn

SIGLIP = siglip2.SigLIP2Config(hidden=96, layers=2, heads=1, mlp=160)
DINO = dinov3.DINOv3Config(hidden=128, layers=2, heads=1, mlp=160)
KINDS = {"siglip2": (siglip2, SIGLIP, 384), "dinov3": (dinov3, DINO, 224)}
both = pytest.mark.parametrize("kind", ["siglip2", "dinov3"])


class Casting:
    """Layers that cast their weights to the input, as the host's do."""

    class Linear(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))

    class LayerNorm(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x), self.bias.to(x), self.eps)

    class Conv2d(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight.to(x), self.bias.to(x))


def shapes_of(kind):
    module, config, _ = KINDS[kind]
    return module.key_shapes(config)


def weights_of(kind, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(shape, generator=generator) * 0.05 + ("norm" in key and "weight" in key)).to(dtype)
        for key, shape in shapes_of(kind).items()
    }


def pixels_of(kind, dtype=torch.float32):
    side = KINDS[kind][2]
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(9)).to(dtype)


@both
def test_recognised_by_names_and_shapes(kind):
    assert towers.recognise_tower(shapes_of(kind), "a.safetensors") == (kind, KINDS[kind][1])
    assert towers.recognise_tower(shapes_of(kind), "a.safetensors", expected=kind)[0] == kind


@pytest.mark.parametrize(("kind", "expected"), [("siglip2", "dinov3"), ("dinov3", "siglip2")])
def test_swapped_encoders_are_named(kind, expected):
    with pytest.raises(StyleLoomError) as caught:
        towers.recognise_tower(shapes_of(kind), "a.safetensors", expected=expected)
    assert "a.safetensors holds the" in caught.value.found
    assert towers._PUBLISHED[expected] in caught.value.expected
    assert "swapped" in caught.value.fix


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("layers_lora.blocks.0.layers.0.proj_a.proj_in.weight", "Load i2L Predictor"),
        ("emb2lora.blocks.0.weight", "v2 predictor"),
        ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "a LoRA"),
        ("vision_model.encoder.layers.0.layer_norm1.weight", "Load CLIP Vision"),
        ("embeddings.patch_embeddings.projection.weight", "DINOv2"),
        ("model.layer.0.norm1.weight", "DINOv3 file saved under other names"),
        ("double_blocks.0.img_attn.qkv.weight", "a diffusion model"),
        ("decoder.conv_in.weight", "a VAE"),
        ("model.layers.0.mlp.up_proj.weight", "a language model"),
        ("something.else", "first tensors: something.else"),
        (None, "without any tensor"),
    ],
)
def test_other_files_are_described(key, name):
    with pytest.raises(StyleLoomError, match="no image encoder") as caught:
        towers.recognise_tower({key: (4, 4)} if key else {}, "a.safetensors", expected="siglip2")
    assert name in caught.value.found
    assert "SigLIP2-G384" in caught.value.expected
    assert "DINOv3-7B" not in caught.value.expected


@both
def test_missing_unexpected_and_misshapen_are_listed(kind):
    shapes = shapes_of(kind)
    block = [key for key in shapes if key.startswith(KINDS[kind][0].BLOCKS + "1.")]
    for key in block[:5]:
        del shapes[key]
    shapes["extra.weight"] = (1,)
    shapes[block[5]] = (7, 7)
    with pytest.raises(StyleLoomError) as caught:
        towers.recognise_tower(shapes, "a.safetensors")
    assert f"5 missing: {block[0]}, {block[1]}, {block[2]} and 2 more" in caught.value.found
    assert "1 unexpected: extra.weight" in caught.value.found
    assert f"1 of the wrong shape: {block[5]} (7, 7) instead of" in caught.value.found


def test_gap_in_the_blocks_is_missing_tensors():
    shapes = {key.replace("layers.1.", "layers.2."): shape for key, shape in shapes_of("siglip2").items()}
    with pytest.raises(StyleLoomError, match="16 missing: encoder.layers.1."):
        towers.recognise_tower(shapes)


@pytest.mark.parametrize("extra", ["scale_weight", "comfy_quant", "weight_scale"])
def test_quantised_files_are_refused(extra):
    shapes = shapes_of("dinov3")
    shapes[f"layer.0.mlp.up_proj.{extra}"] = (1,)
    with pytest.raises(StyleLoomError, match="quantised DINOv3") as caught:
        towers.recognise_tower(shapes, "a.safetensors")
    assert "bf16" in caught.value.fix


@both
def test_tensors_of_the_file_are_used_as_they_are(kind, tmp_path):
    save_file(weights_of(kind, torch.bfloat16), tmp_path / "tower.safetensors")
    mapped = load_file(tmp_path / "tower.safetensors")
    for operations, precision in ((nn, "bf16"), (Casting, "bf16"), (Casting, "fp32")):
        tower = towers.build_tower(mapped, "tower.safetensors", precision, operations=operations)
        state = tower.state_dict()
        assert state.keys() == mapped.keys()
        assert all(state[key].data_ptr() == mapped[key].data_ptr() for key in mapped)
        assert not tower.training
        assert not any(parameter.requires_grad for parameter in tower.parameters())


@both
@torch.no_grad()
def test_casting_layers_compute_what_converted_weights_do(kind):
    half = weights_of(kind, torch.bfloat16)
    full = {key: tensor.float() for key, tensor in half.items()}
    want = towers.build_tower(full, "a", "fp32")(pixels_of(kind))
    assert torch.equal(towers.build_tower(half, "a", "fp32", operations=Casting)(pixels_of(kind)), want)
    assert torch.equal(towers.build_tower(half, "a", "fp32")(pixels_of(kind)), want)
    want = towers.build_tower(half, "a", "bf16")(pixels_of(kind, torch.bfloat16))
    assert want.dtype == torch.bfloat16
    found = towers.build_tower(full, "a", "bf16", operations=Casting)(pixels_of(kind, torch.bfloat16))
    assert torch.equal(found, want)


@both
@torch.no_grad()
def test_weights_may_lie_on_another_device(kind):
    """As the host leaves them when memory is short: every weight, bare ones too, is brought to the pixels' device."""
    tower = towers.build_tower(weights_of(kind, torch.bfloat16), "a", "fp32", operations=Casting)
    found = tower(pixels_of(kind).to("meta"))
    assert found.device.type == "meta"
    assert {parameter.device.type for parameter in tower.parameters()} == {"cpu"}


@both
@torch.no_grad()
def test_fp8_stores_the_matrices_of_the_blocks_alone(kind):
    weights = weights_of(kind, torch.bfloat16)
    tower = towers.build_tower(weights, "a", "fp8", operations=Casting)
    stored = {key for key, tensor in tower.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
    blocks = KINDS[kind][0].BLOCKS
    assert stored == {key for key, tensor in weights.items() if key.startswith(blocks) and tensor.ndim == 2}
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert all(tower.state_dict()[key].float().abs().max() >= 224 for key in stored)
    want = towers.build_tower(weights, "a", "bf16")(pixels_of(kind, torch.bfloat16))
    found = tower(pixels_of(kind, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), want.float()).item() > 0.99


@pytest.mark.parametrize("largest", [1e-30, 1e-6, 0.02, 1.0, 447.9, 448.0, 449.0, 65504.0, 1e30])
def test_fp8_scale_is_a_power_of_two_that_fills_the_range(largest):
    weight = torch.linspace(-1, 1, 64).reshape(8, 8) * largest
    stored, scale = towers.to_fp8(weight, "w")
    assert torch.frexp(torch.tensor(scale, dtype=torch.float64))[0] == 0.5
    assert 224 <= stored.float().abs().max() <= 448
    error = (stored.double() * scale - weight.double()).abs()
    # Three bits of mantissa, half an ulp of rounding; below that the smallest step of the format.
    assert (error <= weight.double().abs() / 16 + largest * 2**-16).all()


def test_fp8_of_small_weights_beats_a_plain_cast():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.01
    stored, scale = towers.to_fp8(weight, "w")
    ours = (stored.float() * scale - weight).norm()
    plain = (weight.to(torch.float8_e4m3fn).float() - weight).norm()
    assert ours < 0.6 * plain


def test_fp8_of_zeros_and_of_fp8():
    zeros, scale = towers.to_fp8(torch.zeros(4, 4), "w")
    assert scale == 1.0
    assert not zeros.float().any()
    already = torch.ones(4, 4).to(torch.float8_e4m3fn)
    assert towers.to_fp8(already, "w") == (already, 1.0)


@both
@torch.no_grad()
def test_plain_fp8_file_is_read(kind):
    """Files that others stored as fp8 without scales; every tensor, the norms and tokens too."""
    weights = weights_of(kind, torch.float8_e4m3fn)
    want = towers.build_tower({key: w.bfloat16() for key, w in weights.items()}, "a", "bf16")
    want = want(pixels_of(kind, torch.bfloat16))
    for precision, operations in (("bf16", nn), ("bf16", Casting), ("fp8", Casting)):
        tower = towers.build_tower(weights, "a", precision, operations=operations)
        assert torch.equal(tower(pixels_of(kind, torch.bfloat16)), want)


def test_damaged_weights_are_refused():
    weights = weights_of("dinov3")
    weights["layer.1.mlp.up_proj.weight"][3, 4] = float("nan")
    with pytest.raises(StyleLoomError, match="layer.1.mlp.up_proj.weight has values that are not finite"):
        towers.build_tower(weights, "a.safetensors", "fp8", operations=Casting)
    tower = towers.build_tower(weights, "a.safetensors", "fp32")
    with pytest.raises(StyleLoomError, match="DINOv3Vision gave an embedding"):
        towers.encode(tower, pixels_of("dinov3"))


def test_encode_gives_the_embedding():
    tower = towers.build_tower(weights_of("siglip2"), "a", "fp32")
    seen = []
    found = towers.encode(tower, pixels_of("siglip2"), on_block=lambda *at: seen.append(at))
    assert found.shape == (1, 96)
    assert seen == [(1, 2), (2, 2)]


def test_wrong_builds_are_refused():
    weights = weights_of("siglip2")
    with pytest.raises(StyleLoomError, match="fp8 storage"):
        towers.build_tower(weights, "a", "fp8")
    with pytest.raises(StyleLoomError, match="Unknown precision 'int4'"):
        towers.build_tower(weights, "a", "int4")
    with pytest.raises(StyleLoomError, match="Unknown precision"):
        towers.compute_dtype("fp16")
    weights["head.probe"] = weights["head.probe"].to(torch.int8)
    with pytest.raises(StyleLoomError, match="not floating point, head.probe"):
        towers.build_tower(weights, "a", "bf16")


def test_compute_dtypes():
    found = [towers.compute_dtype(precision) for precision in towers.PRECISIONS]
    assert found == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_projection_undoes_the_power_of_two_exactly():
    layer = nn.Linear(16, 8).to(torch.bfloat16)
    x = torch.randn(4, 16).bfloat16()
    want = layer(x)
    with torch.no_grad():
        layer.weight *= 2.0**13
    layer.storage_scale = 2.0**-13
    assert torch.equal(tower_parts.project(layer, x), want)
