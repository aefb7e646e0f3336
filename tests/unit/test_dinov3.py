"""DINOv3's tower against transformers' own classes, in float64 and bf16 at small width."""

from __future__ import annotations

import copy
import hashlib
import math
import re

import pytest
import torch
import torch.nn.functional as F
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l import dinov3
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

SMALL = dinov3.DINOv3Config(hidden=256, layers=3, heads=2, mlp=320)


def key_hash(shapes):
    """The published hash of a file's key names and shapes, computed apart from the pack's own."""
    words = [f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()] + list(shapes)
    return hashlib.md5(",".join(sorted(words)).encode()).hexdigest()


def random_weights(shapes, seed):
    """Weights in no special state: biases not zero, norm weights not one, every token its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 or "token" in key else 0.08)
        + ("norm" in key and "weight" in key)
        for key, shape in shapes.items()
    }


def unprefixed(name):
    """transformers < 5 names a block layer.N, later ones model.layer.N."""
    return re.sub(r"^model\.", "", name)


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.fixture(scope="module")
def pair():
    """Our tower and transformers' on the same weights."""
    weights = random_weights(dinov3.key_shapes(SMALL), 1)
    ours = dinov3.DINOv3Vision(SMALL)
    ours.load_state_dict(weights)
    config = DINOv3ViTConfig(
        hidden_size=SMALL.hidden,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        intermediate_size=SMALL.mlp,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-5,
        hidden_act="silu",
        use_gated_mlp=True,
        query_bias=False,
        key_bias=False,
        value_bias=False,
        num_register_tokens=4,
        rope_theta=100.0,
    )
    theirs = DINOv3ViTModel(config).eval()
    theirs.load_state_dict({name: weights[unprefixed(name)] for name in theirs.state_dict()})
    return ours.eval(), theirs


@torch.no_grad()
def test_class_token_is_that_of_transformers(pair):
    ours, theirs = pair
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2)).double()
    want = copy.deepcopy(theirs).double()(pixel_values=pixels).pooler_output
    found = copy.deepcopy(ours).double()(pixels)
    assert found.shape == (2, SMALL.hidden)
    assert want.abs().max() > 0.1
    # In float64, where a processor's rounding is 1e-16; cosines and sines alone are of fp32 in both.
    assert (found - want).abs().max() <= 1e-6


@torch.no_grad()
def test_bf16_is_the_reference_cast_as_a_whole(pair):
    """The reference in bf16 has its frequencies rounded too; with fp32 ones it is measurably another encoder."""
    ours, theirs = dinov3.DINOv3Vision(SMALL), DINOv3ViTModel(pair[1].config).eval()
    ours.load_state_dict(pair[0].state_dict())
    theirs.load_state_dict(pair[1].state_dict())
    ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    assert theirs.rope_embeddings.inv_freq.dtype == torch.bfloat16
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3)).bfloat16()
    for found, want in zip(dinov3.rotation(SMALL, torch.bfloat16, pixels.device), theirs.rope_embeddings(pixels)):
        assert torch.equal(found, want)
    found, want = ours(pixels), theirs(pixel_values=pixels).pooler_output
    exact = theirs.double()(pixel_values=pixels.double()).pooler_output  # weights and frequencies stay those of bf16
    # The same roundings at the same places, which a processor's way to add may throw either way: errors of one size.
    # One more rounding at every place would double the variance; twice the error is four times the variance.
    error = rms(want - exact)
    assert error < 0.05 * rms(exact)
    assert rms(found - exact) < 2 * error and rms(found - want) < 2 * error


def test_rotation_by_its_formula():
    """Element by element: row angles, column angles, then both again."""
    cos, sin = dinov3.rotation(SMALL, torch.float32, torch.device("cpu"))
    assert cos.shape == sin.shape == (196, 128)
    for patch, at in ((0, 0), (17, 5), (100, 31), (100, 32), (195, 63), (60, 64), (60, 127)):
        row, column = divmod(patch, 14)
        place = (row if at % 64 < 32 else column) + 0.5
        angle = 2 * math.pi * (2 * place / 14 - 1) * 100 ** (-4 * (at % 32) / 128)
        assert abs(cos[patch, at].item() - math.cos(angle)) < 1e-5
        assert abs(sin[patch, at].item() - math.sin(angle)) < 1e-5


def test_rounded_frequencies_only_in_bf16():
    exact = [100 ** (-4 * j / 128) for j in range(32)]
    centre = 2 * math.pi * (2 * 13.5 / 14 - 1)
    cos32, _ = dinov3.rotation(SMALL, torch.float32, torch.device("cpu"))
    cos16, _ = dinov3.rotation(SMALL, torch.bfloat16, torch.device("cpu"))
    want32 = torch.tensor([math.cos(centre * f) for f in exact])
    rounded = torch.tensor(exact).bfloat16().double()
    want16 = torch.tensor([math.cos(centre * f) for f in rounded.tolist()]).bfloat16()
    assert (cos32[-1, :32] - want32).abs().max() < 1e-5
    assert (cos16[-1, :32].float() - want16.float()).abs().max() < 2**-8
    assert (cos16[-1, :32].float() - want32.bfloat16().float()).abs().max() > 2**-8


def test_prefix_tokens_have_no_place():
    x = torch.randn(1, 2, 5 + 196, 128, generator=torch.Generator().manual_seed(4))
    turned = dinov3.rotate(x, *dinov3.rotation(SMALL, torch.float32, x.device))
    assert torch.equal(turned[:, :, :5], x[:, :, :5])
    assert ((turned[:, :, 5:] - x[:, :, 5:]).abs().amax((1, 3)) > 0.1).all()
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-4)


def test_published_keys():
    shapes = dinov3.key_shapes(dinov3.DINOv3Config())
    assert len(shapes) == 687
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 6_716_035_072
    assert key_hash(shapes) == "5722b5c873720009de96422993b15682"


@pytest.mark.parametrize("config", [dinov3.DINOv3Config(), SMALL])
def test_config_comes_back_from_shapes(config):
    assert dinov3.config_from_shapes(dinov3.key_shapes(config)) == config


def test_state_dict_is_the_key_list():
    tower = dinov3.DINOv3Vision(SMALL, device="meta")
    assert {key: tuple(value.shape) for key, value in tower.state_dict().items()} == dinov3.key_shapes(SMALL)
    assert all(m.eps == 1e-5 for m in tower.modules() if isinstance(m, nn.LayerNorm))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("embeddings.patch_embeddings.weight", (256, 3, 14, 14), "patch height of 14"),
        ("embeddings.patch_embeddings.weight", (384, 3, 16, 8), "patch width of 8"),
        ("embeddings.patch_embeddings.weight", (200, 3, 16, 16), "width"),
        ("embeddings.register_tokens", (4, 256), "2-dimensional tensor embeddings.register_tokens"),
        ("layer.0.mlp.gate_proj.weight", None, "has no tensor layer.0.mlp.gate_proj.weight"),
    ],
)
def test_other_sizes_are_refused(key, shape, message):
    shapes = dinov3.key_shapes(SMALL)
    shapes[key] = shape
    if shape is None:
        del shapes[key]
    with pytest.raises(StyleLoomError, match=message) as caught:
        dinov3.config_from_shapes(shapes, "tower.safetensors")
    assert "tower.safetensors" in caught.value.found


def test_blocks_are_reported_and_attention_can_be_given(pair):
    seen, calls = [], []

    def attention(q, k, v):
        calls.append(tuple(q.shape))
        return F.scaled_dot_product_attention(q, k, v)

    tower = dinov3.DINOv3Vision(SMALL, attention=attention)
    tower.load_state_dict(pair[0].state_dict())
    pixels = torch.ones(1, 3, 224, 224)
    with torch.no_grad():
        found = tower(pixels, on_block=lambda done, total: seen.append((done, total)))
        assert torch.equal(found, pair[0](pixels))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert calls == [(1, 2, 201, 128)] * 3


def test_wrong_pixels_are_refused(pair):
    with pytest.raises(StyleLoomError, match=r"\(3, 224, 224\)"):
        pair[0](torch.zeros(3, 224, 224))
