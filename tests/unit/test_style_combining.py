"""Combining references, a weight for each of them, sides turned round, scalings: against plain arithmetic in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.ip_adapter.combine import WAYS, combine, parse_numbers, repeat_last
from styleloom.weights.ip_adapter.formats import recognise
from styleloom.weights.ip_adapter.keys_values import (
    EACH, FUSIONS, K_AND_MEAN_BY_WIDTH, K_AND_V_BY_WIDTH, SCALINGS, fuse, project, turned, weighted)  # fmt: skip
from styleloom.weights.ip_adapter.projections import image_tokens
from styleloom.weights.row_adapters.rows import NEGATIVE, POSITIVE
from styleloom.weights.unet.architecture import SD15


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow(z, way, w):
    """Vector by vector, in float64."""
    rows = [[float(x) for x in row.flatten()] for row in z.double()]
    size = z.shape[-1]
    spots = range(len(rows[0]))
    if way == "average":
        return [sum(wi * r[j] for wi, r in zip(w, rows)) / sum(w) for j in spots]
    if way == "add":
        return [sum(wi * r[j] for wi, r in zip(w, rows)) for j in spots]
    if way == "subtract":
        others = range(1, len(rows))
        return [w[0] * rows[0][j] - sum(w[i] * rows[i][j] for i in others) / len(others) if len(rows) > 1
                else w[0] * rows[0][j] for j in spots]  # fmt: skip
    if way in ("max", "min"):
        return [{"max": max, "min": min}[way](wi * r[j] for wi, r in zip(w, rows)) for j in spots]
    norm = [[math.sqrt(sum(x * x for x in r[s : s + size])) for s in range(0, len(r), size)] for r in rows]
    length = [sum(wi * n[t] for wi, n in zip(w, norm)) / sum(w) for t in range(len(norm[0]))]
    return [length[j // size] * sum(wi * r[j] / n[j // size] for wi, r, n in zip(w, rows, norm)) / sum(w)
            for j in spots]  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(way=st.sampled_from(WAYS), count=st.integers(1, 4), patches=st.booleans(), seed=st.integers(0, 999),
       given_weights=st.booleans())  # fmt: skip
def test_ways_of_combining(way, count, patches, seed, given_weights):
    z = draw(seed, count, 3, 5) if patches else draw(seed, count, 5)
    w = [0.5 + ((seed + i) % 7) / 3 for i in range(count)]
    made = combine(z, way, w if given_weights else None)
    assert made.shape == (1, *z.shape[1:]) and made.dtype == torch.float32
    due = torch.tensor(slow(z, way, w if given_weights else [1.0] * count), dtype=torch.float64)
    # A handful of fp32 sums of numbers of size one.
    assert torch.allclose(made.flatten().double(), due, rtol=1e-5, atol=1e-5)
    assert count > 1 or given_weights or torch.allclose(made, z, rtol=1e-6), "one picture is itself"


def test_numbers_as_they_are_typed():
    assert parse_numbers(" 1, .5;\n-2e-1 ", "x") == [1.0, 0.5, -0.2] and parse_numbers(" ", "x") == []
    for text in ("1, a", "nan", "1, inf"):
        with pytest.raises(StyleLoomError, match="reference_weights is '"):
            parse_numbers(text, "reference_weights")
    assert repeat_last([1, 2], 4) == [1, 2, 2, 2]
    with pytest.raises(StyleLoomError, match="sum up to 0"):
        combine(draw(0, 2, 3), "average", [1, -1])


# --- with an adapter: two tokens a picture, cross width 6, layers 8 wide

WIDTH, CROSS, TOKENS, OUT = 5, 6, 2, 8
LAYER = ("output", 3, 0)


@pytest.fixture(scope="module")
def adapter():
    proj = {"proj.weight": draw(1, TOKENS * CROSS, WIDTH), "proj.bias": draw(2, TOKENS * CROSS),
            "norm.weight": draw(3, CROSS), "norm.bias": draw(4, CROSS)}  # fmt: skip
    ip = {f"{n}.to_{p}_ip.weight": draw(n + (p == "v"), OUT, CROSS) for n in SD15.file_numbers.values() for p in "kv"}
    return recognise("small", {"image_proj": proj, "ip_adapter": ip})


def attend(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


def close(a, b):
    return torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_options_are_appended():
    assert FUSIONS[:3] == ("concat", "average", "one per picture") and SCALINGS[:2] == ("V", "K+V")


@pytest.mark.parametrize("way", [way for way in WAYS if way != "average"])
def test_fusions_combine_before_the_projection(adapter, way):
    z, other = draw(5, 3, WIDTH), draw(6, 2, WIDTH)
    made = fuse(adapter, z, other, way, [1.0, 0.5, 2.0])
    assert made.shape == (2, 1, TOKENS, CROSS)
    assert close(made[POSITIVE], image_tokens(adapter, combine(z, way, [1.0, 0.5, 2.0])))
    assert close(made[NEGATIVE], image_tokens(adapter, other.mean(0, keepdim=True)))


def test_the_last_is_used_again(adapter):
    z, other = draw(5, 3, WIDTH), draw(6, 2, WIDTH)
    for weights, count in ((None, 3), ([1.0] * 5, 5)):
        made = fuse(adapter, z, other, EACH, weights)
        assert close(made[POSITIVE], image_tokens(adapter, z[[0, 1, 2, 2, 2][:count]]))
        assert close(made[NEGATIVE], image_tokens(adapter, other[[0, 1, 1, 1, 1][:count]]))
    assert fuse(adapter, z[:1], z, EACH).shape[1] == 3, "one reference, three negatives"


def test_a_weight_for_each_reference(adapter):
    """V of a reference times its weight; the attention between the references is as it was."""
    z, w, q = draw(5, 3, WIDTH), [0.5, 2.0, -1.0], draw(7, 4, OUT)
    wk, wv = (t.double() for t in adapter.layers[SD15.file_numbers[LAYER]])
    keys = fuse(adapter, z, None, "concat")
    values = weighted(keys, "concat", w, TOKENS)
    k, v = project(adapter, {LAYER: (0.8, "style")}, {"style": keys}, "V", torch.float32, values={"style": values})[LAYER]
    tokens = image_tokens(adapter, z).double()
    shares = torch.softmax(q.double() @ (tokens.flatten(0, 1) @ wk.T).T / math.sqrt(OUT), -1)
    due = sum(shares[:, TOKENS * i : TOKENS * (i + 1)] @ (tokens[i] @ wv.T) * w[i] for i in range(3)) * 0.8
    assert close(attend(q, k[POSITIVE, 0], v[POSITIVE, 0]), due)
    empty = image_tokens(adapter, torch.zeros(1, WIDTH))[0].double()
    assert close(attend(q, k[NEGATIVE, 0], v[NEGATIVE, 0]), attend(q, empty @ wk.T, empty @ wv.T) * 0.8 * sum(w) / 3)
    same = weighted(keys, "concat", [0.5] * 3, TOKENS)
    assert close(same, keys * 0.5), "equal weights are one weight"
    each = fuse(adapter, z, None, EACH, [1.0, 2.0, 3.0, 4.0])
    assert close(weighted(each, EACH, [1.0, 2.0, 3.0, 4.0], TOKENS), each * torch.arange(1.0, 5.0).view(1, 4, 1, 1))
    assert weighted(keys, "add", w, TOKENS) is keys, "used before"


def test_sides_turned_round(adapter):
    style, layout = fuse(adapter, draw(5, 3, WIDTH), None, "concat"), fuse(adapter, draw(6, 2, WIDTH), None, "concat")
    alone = turned(style)
    assert float(alone[POSITIVE].abs().max()) == 0 and torch.equal(alone[NEGATIVE], style[POSITIVE])
    both, q = turned(style, layout), draw(8, 4, CROSS)
    for side, whose in ((NEGATIVE, style), (POSITIVE, layout)):
        seen = whose[POSITIVE, 0]
        assert close(attend(q, both[side, 0], both[side, 0]), attend(q, seen, seen))


@pytest.mark.parametrize("scaling", [K_AND_V_BY_WIDTH, K_AND_MEAN_BY_WIDTH])
def test_scalings_by_width(adapter, scaling):
    """The pack's own arithmetic: w times width / 1280; then K and V, or K and the mean of V, times that."""
    tokens, q = draw(9, 2, 1, 3, CROSS), draw(10, 2, 1, 4, OUT)
    k, v = project(adapter, {LAYER: (300.0, "style")}, {"style": tokens}, scaling, torch.float32)[LAYER]
    wk, wv = (t.double() for t in adapter.layers[SD15.file_numbers[LAYER]])
    w = 300.0 * (OUT / 1280)
    due_k, due_v = tokens.double() @ wk.T * w, tokens.double() @ wv.T
    mean = due_v.mean(-2, keepdim=True)
    due_v = due_v * w if scaling == K_AND_V_BY_WIDTH else (due_v - mean) + mean * w
    assert close(attend(q, k, v), attend(q, due_k, due_v))
