"""Every kind of adapter as a low-rank product, against the dense formula of its kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.lora.kinds import low_rank
from styleloom.weights.lora.algebra import thin_svd

F64 = torch.float64
QUICK = settings(max_examples=40, deadline=None)
KERNELS = st.sampled_from([(), (1, 1), (3, 3), (1, 3), (3,)])


class Made:
    """Random tensors of float64, the same for the same seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=F64)


def dense_of(adapter) -> torch.Tensor:
    down, up = adapter.factors()
    return (up @ down).reshape(adapter.weight_shape)


def close(adapter, due: torch.Tensor) -> None:
    assert adapter.weight_shape == tuple(due.shape)
    assert (dense_of(adapter) - due).norm() <= 1e-6 * due.norm() + 1e-12


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 9), KERNELS, st.sampled_from([None, 0.5, 7.0]))
def test_lora_and_locon(seed, rank, kernel, alpha):
    make = Made(seed)
    down, up = make(rank, 5, *kernel), make(6, rank, *[1] * len(kernel))
    parts = {"down": down, "up": up} | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    due = torch.einsum("or,ri...->oi...", up.flatten(1), down) * (1 if alpha is None else alpha / rank)
    found = low_rank(parts, "x")
    close(found, due)
    assert found.rank == rank and found.kernel == kernel


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.sampled_from([(3, 3), (1, 3)]))
def test_tucker(seed, rank, inner, kernel):
    make = Made(seed)
    down, mid, up = make(inner, 5, 1, 1), make(rank, inner, *kernel), make(6, rank, 1, 1)
    found = low_rank({"down": down, "mid": mid, "up": up, "alpha": torch.tensor(2.0)}, "x")
    due = torch.einsum("or,rj...,ji->oi...", up.flatten(1), mid, down.flatten(1)) * 2 / inner
    close(found, due)


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 3.0]))
def test_loha(seed, r1, r2, alpha):
    make = Made(seed)
    a, b, c, d = make(9, r1), make(r1, 8), make(9, r2), make(r2, 8)
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    parts |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
    found = low_rank(parts, "x")
    close(found, (a @ b) * (c @ d) * (1 if alpha is None else alpha / r1))
    assert found.rank <= min(r1 * r2, 8)


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3))
def test_loha_with_tucker(seed, r1, r2):
    make = Made(seed)
    t1, t2 = make(r1, r1, 3, 3), make(r2, r2, 3, 3)
    a, b, c, d = make(r1, 9), make(r1, 8), make(r2, 9), make(r2, 8)
    names = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")
    found = low_rank(dict(zip(names, (t1, a, b, t2, c, d)), alpha=torch.tensor(2.0)), "x")
    one = torch.einsum("ijkl,jr,ip->prkl", t1, b, a)
    two = torch.einsum("ijkl,jr,ip->prkl", t2, d, c)
    close(found, one * two * 2 / r1)


@QUICK
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.sampled_from([(), (3, 3)]), st.booleans())
def test_lokr(seed, full1, full2, kernel, tucker):
    make = Made(seed)
    parts, rank = {"alpha": torch.tensor(3.0)}, None
    if full1:
        w1 = parts["lokr_w1"] = make(3, 2)
    else:
        parts["lokr_w1_a"], parts["lokr_w1_b"] = make(3, 2), make(2, 2)
        w1, rank = parts["lokr_w1_a"] @ parts["lokr_w1_b"], 2
    if full2:
        w2 = parts["lokr_w2"] = make(5, 4, *kernel)
    elif tucker and kernel:
        parts |= {"lokr_t2": make(3, 3, *kernel), "lokr_w2_a": make(3, 5), "lokr_w2_b": make(3, 4)}
        w2 = torch.einsum("ijkl,jr,ip->prkl", parts["lokr_t2"], parts["lokr_w2_b"], parts["lokr_w2_a"])
        rank = 3
    else:
        parts["lokr_w2_a"], parts["lokr_w2_b"] = make(5, 3), make(3, 4 * math.prod(kernel))
        w2, kernel = parts["lokr_w2_a"] @ parts["lokr_w2_b"], ()
        rank = 3
    scale = 1.0 if rank is None else 3.0 / rank
    found = low_rank(parts, "x")
    close(found, torch.kron(w1.reshape(3, 2, *[1] * (w2.ndim - 2)).contiguous(), w2.contiguous()) * scale)
    assert found.rank <= min(2, 3) * min(5, w2.flatten(1).shape[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_half_and_quarter_precision_are_read_exactly(dtype):
    down, up = (torch.randn(3, 4).to(dtype), torch.randn(5, 3).to(dtype))
    found = low_rank({"down": down, "up": up}, "x")
    assert found.down.dtype == dtype, "kept as it is until a layer is computed with"
    assert all(torch.equal(own, due.float()) for own, due in zip(found.factors(), (down, up)))


@pytest.mark.parametrize("rank", [1, 512])
def test_ranks_at_both_ends(rank):
    down, up = torch.randn(rank, 40), torch.randn(30, rank)
    svd = thin_svd(down, up)
    assert svd.values.numel() == min(rank, 30)
    assert torch.allclose(svd.up * svd.values @ svd.down, up @ down, atol=2e-3 * rank**0.5)


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([1.0, 1e-2, 1e-3, 1e-6, 0.0]), st.floats(1e-4, 1e4))
def test_the_svd_of_a_product_in_float32(seed, rank, spread, scale):
    """Well and badly conditioned factors, against float64; orthonormal on both sides whichever way is taken."""
    make = Made(seed)
    sizes = torch.linspace(1, spread, rank, dtype=F64)
    down, up = scale * sizes[:, None] * make(rank, 20), make(15, rank)
    if rank > 2:
        down[-1] = down[0] + spread * down[-1]
    svd = thin_svd(down.float(), up.float())
    due = up @ down
    k = svd.values.numel()
    assert torch.allclose(svd.down @ svd.down.T, torch.eye(k), atol=2e-5)
    assert torch.allclose(svd.up.T @ svd.up, torch.eye(k), atol=2e-5)
    assert ((svd.up * svd.values @ svd.down).double() - due).norm() <= 2e-6 * due.norm() * rank
    exact = torch.linalg.svdvals(due)[:k]
    assert bool(((svd.values.double() - exact).abs() <= 2e-6 * rank * exact[0]).all())


def test_zero_has_rank_zero():
    assert thin_svd(torch.randn(3, 4), torch.zeros(5, 3)).values.numel() == 0


@pytest.mark.parametrize(("parts", "words"), [
    ({"down": (3, 4)}, "lacks up"),
    ({"down": (3, 4), "up": (5, 2)}, "one rank"),
    ({"down": (3, 4), "up": (5, 3), "dora": (5, 1)}, "DoRA"),
    ({"hada_w1_a": (3, 2), "hada_w1_b": (2, 4), "hada_w2_a": (3, 2)}, "lacks hada_w2_b"),
    ({"hada_w1_a": (3, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}, "do not fit"),
    ({"lokr_w1": (3, 2)}, "lacks"),
    ({"down": (3, 4, 1, 1), "mid": (2, 2, 3, 3), "up": (5, 2, 1, 1)}, "mid is"),
])
def test_what_is_refused(parts, words):
    with pytest.raises(StyleLoomError, match=words):
        low_rank({name: torch.ones(shape) for name, shape in parts.items()}, "some.layer")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(value):
    down = torch.ones(2, 3)
    down[1, 1] = value
    with pytest.raises(StyleLoomError, match="some.layer: the LoRA holds NaN"):
        low_rank({"down": down, "up": torch.ones(4, 2)}, "some.layer")
