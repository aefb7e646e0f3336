"""SigLIP2's tower against transformers' own classes, in float64 and bf16 at small width."""

from __future__ import annotations

import copy
import hashlib
import re

import pytest
import torch
import torch.nn.functional as F
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l import siglip2
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

SMALL = siglip2.SigLIP2Config(hidden=192, layers=3, heads=2, mlp=320)


def key_hash(shapes):
    """The published hash of a file's key names and shapes, computed apart from the pack's own."""
    words = [f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()] + list(shapes)
    return hashlib.md5(",".join(sorted(words)).encode()).hexdigest()


def random_weights(shapes, seed):
    """Weights in no special state: biases not zero, norm weights not one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else 0.08)
        + ("norm" in key and "weight" in key)
        for key, shape in shapes.items()
    }


def unprefixed(name):
    """transformers < 5.6 holds the tower under vision_model., later ones hold it bare."""
    return re.sub(r"^vision_model\.", "", name)


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.fixture(scope="module")
def pair():
    """Our tower and transformers' on the same weights."""
    weights = random_weights(siglip2.key_shapes(SMALL), 1)
    ours = siglip2.SigLIP2Vision(SMALL)
    ours.load_state_dict(weights)
    config = SiglipVisionConfig(
        hidden_size=SMALL.hidden,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        intermediate_size=SMALL.mlp,
        image_size=384,
        patch_size=16,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
    )
    theirs = SiglipVisionModel(config).eval()
    theirs.load_state_dict({name: weights[unprefixed(name)] for name in theirs.state_dict()})
    return ours.eval(), theirs


@torch.no_grad()
def test_pooled_output_is_that_of_transformers(pair):
    ours, theirs = pair
    pixels = torch.randn(2, 3, 384, 384, generator=torch.Generator().manual_seed(2)).double()
    want = copy.deepcopy(theirs).double()(pixel_values=pixels).pooler_output
    found = copy.deepcopy(ours).double()(pixels)
    assert found.shape == (2, SMALL.hidden)
    assert want.abs().max() > 0.1
    assert (found - want).abs().max() <= 1e-9  # in float64, where a processor's rounding is 1e-16


@torch.no_grad()
def test_pooling_head_written_out(pair):
    """The head by its formula: one query, each head of 96 by itself, the residual after the attention."""
    head = pair[0].head
    x = torch.randn(1, 576, SMALL.hidden, generator=torch.Generator().manual_seed(4))
    weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
    q = F.linear(head.probe[0, 0], weight, bias).double()[: SMALL.hidden]
    _, k, v = F.linear(x[0], weight, bias).double().chunk(3, -1)
    parts = []
    for i in range(SMALL.heads):
        at = slice(96 * i, 96 * (i + 1))
        scores = (k[:, at] @ q[at]) / 96**0.5
        parts.append(torch.softmax(scores, 0) @ v[:, at])
    pooled = head.attention.out_proj(torch.cat(parts).float())
    want = pooled + head.mlp.fc2(F.gelu(head.mlp.fc1(head.layernorm(pooled)), approximate="tanh"))
    assert (head(x)[0] - want).abs().max() < 1e-5


def test_published_keys():
    shapes = siglip2.key_shapes(siglip2.SigLIP2Config())
    assert len(shapes) == 656
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_163_659_776
    assert key_hash(shapes) == "469c78b61e3e31bc9eec0d0af3d3f2f8"


@pytest.mark.parametrize("config", [siglip2.SigLIP2Config(), SMALL])
def test_config_comes_back_from_shapes(config):
    assert siglip2.config_from_shapes(siglip2.key_shapes(config)) == config


def test_state_dict_is_the_key_list():
    tower = siglip2.SigLIP2Vision(SMALL, device="meta")
    assert {key: tuple(value.shape) for key, value in tower.state_dict().items()} == siglip2.key_shapes(SMALL)
    assert all(m.eps == 1e-6 for m in tower.modules() if isinstance(m, nn.LayerNorm))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("embeddings.patch_embedding.weight", (192, 3, 14, 14), "patch height of 14"),
        ("embeddings.patch_embedding.weight", (192, 1, 16, 16), "colour channels of 1"),
        ("embeddings.patch_embedding.weight", (200, 3, 16, 16), "width"),
        ("embeddings.position_embedding.weight", (196, 192), "side in patches of 14"),
        ("embeddings.position_embedding.weight", (577, 192), "table of positions of 577"),
        ("encoder.layers.0.mlp.fc1.weight", None, "has no tensor encoder.layers.0.mlp.fc1.weight"),
    ],
)
def test_other_sizes_are_refused(key, shape, message):
    shapes = siglip2.key_shapes(SMALL)
    shapes[key] = shape
    if shape is None:
        del shapes[key]
    with pytest.raises(StyleLoomError, match=message) as caught:
        siglip2.config_from_shapes(shapes, "tower.safetensors")
    assert "tower.safetensors" in caught.value.found


def test_blocks_are_reported_and_can_stop(pair):
    seen = []
    pixels = torch.zeros(1, 3, 384, 384)
    with torch.no_grad():
        pair[0](pixels, on_block=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 3), (2, 3), (3, 3)]

        def stop(done, total):
            raise InterruptedError

        with pytest.raises(InterruptedError):
            pair[0](pixels, on_block=stop)


def test_attention_can_be_given(pair):
    calls = []

    def attention(q, k, v):
        calls.append((tuple(q.shape), tuple(k.shape)))
        return F.scaled_dot_product_attention(q, k, v)

    tower = siglip2.SigLIP2Vision(SMALL, attention=attention)
    tower.load_state_dict(pair[0].state_dict())
    pixels = torch.ones(1, 3, 384, 384)
    with torch.no_grad():
        assert torch.equal(tower(pixels), pair[0](pixels))
    assert calls == [((1, 2, 576, 96), (1, 2, 576, 96))] * 3


def test_wrong_pixels_are_refused(pair):
    with pytest.raises(StyleLoomError, match=r"\(1, 3, 224, 224\)"):
        pair[0](torch.zeros(1, 3, 224, 224))


@torch.no_grad()
def test_bf16_is_the_reference_cast_as_a_whole(pair):
    ours, theirs = siglip2.SigLIP2Vision(SMALL), SiglipVisionModel(pair[1].config).eval()
    ours.load_state_dict(pair[0].state_dict())
    theirs.load_state_dict(pair[1].state_dict())
    # One picture at a time, as the reference is used: with more, its head puts the rows in another order.
    pixels = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = ours.to(torch.bfloat16)(pixels)
    assert found.dtype == torch.bfloat16
    want = theirs.to(torch.bfloat16)(pixel_values=pixels).pooler_output
    exact = theirs.double()(pixel_values=pixels.double()).pooler_output  # the weights stay those of bf16
    # The same roundings at the same places, which a processor's way to add may throw either way: errors of one size.
    # One more rounding at every place would double the variance; twice the error is four times the variance.
    error = rms(want - exact)
    assert error < 0.02 * rms(exact)
    assert rms(found - exact) < 2 * error and rms(found - want) < 2 * error
