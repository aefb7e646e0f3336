"""Attention over few keys against the plain formula in float64, with bounds from the roundings that are made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from styleloom.weights.ip_adapter.few_keys import add_attention


def due(out, q, k, v, heads, share=None):
    """out + share * softmax(q kT / sqrt(d)) v, one head and one row at a time."""
    made = out.double().clone()
    d = q.shape[-1] // heads
    for row in range(len(q)):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = q[row, :, part].double() @ k[row, :, part].double().T / d**0.5
            image = torch.softmax(scores, -1) @ v[row, :, part].double()
            made[row, :, part] += image if share is None else share[row % len(share)].double() * image
    return made


def tensors(rows, queries, keys, heads, d, dtype, seed, loud=1.0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(rows, n, heads * d, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(queries), draw(queries) * loud, draw(keys), draw(keys)


def bound(dtype, out, q, k, v, d):
    """Scores are sums of d products in fp32, and an error e of a score changes a share by at most 2e of itself; the sum
    over the keys has values up to the largest of v; what is added is rounded once, in the dtype of the result."""
    fine = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = float(q.double().abs().max() * k.double().abs().max()) * d**0.5
    image = float(v.double().abs().max())
    whole = float(out.double().abs().max()) + image
    return 2 * fine * (d + 2) * size * image + 20 * fine * whole + torch.finfo(dtype).eps * whole


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_it_is_the_formula(data):
    draw = lambda *among: data.draw(st.sampled_from(among))  # noqa: E731
    rows, keys, heads, d = draw(1, 2, 3), draw(1, 4, 5, 16), draw(1, 2, 5), draw(1, 8, 40)
    queries = data.draw(st.integers(1, 9)) if data.draw(st.booleans()) else draw(255, 256, 257, 600)
    dtype = draw(torch.float32, torch.bfloat16, torch.float16, torch.float64)
    out, q, k, v = tensors(rows, queries, keys, heads, d, dtype, data.draw(st.integers(0, 9)), draw(0.0, 1.0, 30.0))
    share = draw(None, 1, rows)
    share = None if share is None else torch.rand(share, queries, 1).to(dtype)
    wanted, limit = due(out, q, k, v, heads, share), bound(dtype, out, q, k, v, d)
    kept = q.clone()
    assert add_attention(out, q, k, v, heads, share) is out
    assert out.dtype == dtype and torch.equal(q, kept)
    assert float((out.double() - wanted).abs().max()) <= limit


def test_large_scores_do_not_overflow():
    out, q, k, v = tensors(1, 3, 4, 2, 8, torch.float16, 0, loud=3000.0)
    wanted = due(out, q, k, v, 2)
    assert torch.allclose(add_attention(out, q, k, v, 2).double(), wanted, atol=0.02) and wanted.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_queries_is_made_in_fp32(dtype):
    """What it allocates at a time is a piece: far less than the queries in fp32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                made.append(result.untyped_storage().nbytes() if result.untyped_storage().data_ptr() not in given else 0)
            return result

    out, q, k, v = tensors(2, 4096, 4, 2, 32, dtype, 0)
    given = {t.untyped_storage().data_ptr() for t in (out, q, k, v)}
    with Watch():
        add_attention(out, q, k, v, 2)
    assert 0 < max(made) <= q.numel() * 4 / 16
