"""Fusing and truncating, as algebra: compared with the change of the weight itself, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l.fusion import check_bias, fuse_target, parse_weights
from styleloom.weights.lora.algebra import concatenate, frobenius_norm, truncate
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.lora.lora_model import LoRAModel, split_pairs, to_lora_model

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))


def _pair(n_in, n_out, rank, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, n_in, generator=g, dtype=torch.float64).to(dtype),
        torch.randn(n_out, rank, generator=g, dtype=torch.float64).to(dtype),
    )


def _delta(pair):
    return pair.up.double() @ pair.down.double()


@settings(deadline=None)
@given(size=sizes, k=st.integers(1, 6))
def test_truncation_is_the_best_approximation(size, k):
    pair = _pair(*size)
    delta = _delta(pair)
    small = truncate(pair, k)
    assert small.rank <= max(k, 1) and small.down.dtype == torch.float64
    s = torch.linalg.svdvals(delta)
    best = s[k:].square().sum().sqrt()
    assert abs(torch.linalg.norm(delta - _delta(small)) - best) <= 1e-9 * (1 + s[0])
    if pair.rank <= k:
        assert small is pair


@settings(deadline=None)
@given(size=sizes)
def test_norm_without_the_product(size):
    pair = _pair(*size)
    expected = float(torch.linalg.norm(_delta(pair)))
    assert abs(frobenius_norm(pair) - expected) <= 1e-9 * (1 + expected)


def test_truncate_refuses_rank_zero():
    with pytest.raises(ValueError, match="at least 1"):
        truncate(_pair(3, 3, 2, 0), 0)


@settings(deadline=None, max_examples=50)
@given(
    count=st.integers(1, 5),
    predictors=st.integers(1, 2),
    seed=st.integers(0, 1000),
    strength=st.floats(-3, 3),
    raw=st.lists(st.floats(0, 5), min_size=5, max_size=5),
    with_bias=st.booleans(),
)
def test_fusion_is_the_weighted_sum_of_changes(count, predictors, seed, strength, raw, with_bias):
    raw = [w + (0.1 if i == 0 else 0) for i, w in enumerate(raw[:count])]
    weights = [w / sum(raw) for w in raw]
    decoded = [
        [_pair(6, 5, 2, seed + 10 * p + n, torch.float32) for n in range(count)] for p in range(predictors)
    ]
    bias = _pair(6, 5, 3, seed + 99, torch.float32) if with_bias else None
    fused = fuse_target(decoded, weights, strength, extra=bias)
    expected = sum(w * _delta(d[n]) for d in decoded for n, w in enumerate(weights))
    expected = strength * (expected + (_delta(bias) if with_bias else 0))
    torch.testing.assert_close(_delta(fused), expected, rtol=1e-5, atol=1e-5)
    assert fused.rank == 2 * predictors * sum(w > 0 for w in weights) + 3 * with_bias


def test_published_merge_in_bf16_to_the_bit():
    """A is concatenated and multiplied by 1/N in bf16 with one rounding, B is left alone."""
    pairs = [_pair(7, 5, 4, n, torch.bfloat16) for n in range(3)]
    fused = fuse_target([pairs], [1 / 3] * 3)
    assert torch.equal(fused.down, torch.cat([p.down for p in pairs]) * (1 / 3))
    assert torch.equal(fused.up, torch.cat([p.up for p in pairs], dim=1))


def test_strength_scales_the_change_once():
    pairs = [_pair(7, 5, 4, 0)]
    one, two = (fuse_target([pairs], [1.0], strength=s) for s in (1.0, 2.0))
    torch.testing.assert_close(_delta(two), 2 * _delta(one))


@pytest.mark.parametrize("max_rank", [1, 3, 8, 64])
def test_rank_cap_of_a_fusion(max_rank):
    decoded = [[_pair(30, 40, 4, n, torch.float32) for n in range(5)]]
    exact, capped = (fuse_target(decoded, [0.2] * 5, max_rank=r) for r in (0, max_rank))
    k = min(max_rank, 20)
    values = torch.linalg.svdvals(_delta(exact))
    missed = torch.linalg.norm(_delta(exact) - _delta(capped))
    # Eckart-Young: no matrix of rank k comes nearer. The factors are computed and stored in fp32 (2^-24): an error of
    # some ten roundings of the largest value. The entries themselves are not compared, as they may turn by much more
    # where two singular values are close.
    assert abs(missed - values[k:].square().sum().sqrt()) <= 40 * 2**-24 * values[0] * 20**0.5
    assert capped.rank == k


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("", [1 / 3] * 3),
        ("  ", [1 / 3] * 3),
        ("1,1,1", [1 / 3] * 3),
        ("2 1\n1", [0.5, 0.25, 0.25]),
        ("0; 3; 0", [0, 1, 0]),
    ],
)
def test_weights_are_read(text, weights):
    assert parse_weights(text, 3) == weights


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1, x, 2", "numbers, such as"),
        ("1,2", "has 2 numbers for 3 pictures"),
        ("1 2 3 4", "has 4 numbers"),
        ("1,-1,1", "0 or more"),
        ("0 0 0", "not all of them 0"),
        ("nan 1 1", "0 or more"),
        ("inf,1,1", "0 or more"),
    ],
)
def test_weights_that_mean_nothing_are_refused(text, words):
    with pytest.raises(StyleLoomError, match=words):
        parse_weights(text, 3)


def _named(spelling, name="layers.0.attention.to_q", alpha=None):
    pair = _pair(4, 6, 2, 0)
    lora = {name + spelling[0]: pair.down, name + spelling[1]: pair.up}
    if alpha is not None:
        lora[name + ".alpha"] = torch.tensor(alpha)
    return pair, lora


@pytest.mark.parametrize(
    "spelling",
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_down.weight", ".lora_up.weight"),
        (".lora.down.weight", ".lora.up.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("alpha", [None, 1.0, 4.0])
def test_pairs_are_read_in_every_spelling(spelling, prefix, alpha):
    pair, lora = _named(spelling, prefix + "layers.0.attention.to_q", alpha)
    pairs, rest = split_pairs(lora)
    assert list(pairs) == ["layers.0.attention.to_q"] and rest == []
    torch.testing.assert_close(
        _delta(pairs["layers.0.attention.to_q"]), _delta(pair) * (1 if alpha is None else alpha / 2)
    )


def test_what_is_no_pair_is_left_over():
    lora = {
        "a.lora_A.weight": torch.ones(2, 3),
        "b.diff": torch.ones(1),
        "c.alpha": torch.ones(()),
        "d.lora_down.weight": torch.ones(2, 3, 1, 1),
        "d.lora_up.weight": torch.ones(4, 2, 1, 1),
    }
    pairs, rest = split_pairs(lora)
    assert pairs == {} and set(rest) == set(lora)
    with pytest.raises(StyleLoomError, match=r"\[2, 3\].*\[4, 1\]"):
        split_pairs({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 1)})


def test_to_lora_model_is_a_dict_with_a_recipe():
    pair = LowRank(torch.ones(3, 2).T, torch.ones(2, 4).T)
    lora = to_lora_model({"layers.0.x": pair}, {"recipe": "…"})
    assert isinstance(lora, dict) and isinstance(lora, LoRAModel) and lora.metadata == {"recipe": "…"}
    assert set(lora) == {"diffusion_model.layers.0.x.lora_A.weight", "diffusion_model.layers.0.x.lora_B.weight"}
    assert all(t.is_contiguous() for t in lora.values())


def test_concatenate_keeps_dtype():
    out = concatenate([_pair(3, 3, 1, 0, torch.bfloat16), _pair(3, 3, 2, 1, torch.bfloat16)], [0.3, 1.0])
    assert out.down.dtype == out.up.dtype == torch.bfloat16 and out.rank == 3


@pytest.mark.parametrize(
    ("bias", "rest", "words"),
    [
        ({"a": _pair(3, 4, 2, 0)}, [], "lacks 1 targets \\(b\\)"),
        ({k: _pair(3, 4, 2, 0) for k in "abc"}, [], "additional keys, not of the predictor: 1 targets \\(c\\)"),
        ({k: _pair(3, 4, 2, 0) for k in "ab"}, ["z.diff"], "z.diff"),
        ({k: _pair(3, 5, 2, 0) for k in "ab"}, [], "other widths at 2 targets"),
    ],
)
def test_a_bias_of_other_targets_is_refused(bias, rest, words):
    with pytest.raises(StyleLoomError, match=words):
        check_bias(bias, rest, ["a", "b"], lambda name: (3, 4))
    assert check_bias({k: _pair(3, 4, 2, 0) for k in "ab"}, [], ["a", "b"], lambda name: (3, 4)) is None
