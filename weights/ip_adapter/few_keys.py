"""Attention over the few tokens of a picture, as two thin products added to what is there.

A general attention is made for as many keys as queries: it copies the queries into another order, walks over the keys
in blocks and writes its result before somebody adds it. With 4 or 16 keys nearly all of the time goes into that. Here
a piece of the queries at a time is copied to where the processor's cache holds it; each head's scores are one product
of a (keys, d) and a (d, queries) matrix, read where they lie; the keys are the leading axis of the scores, so that
the softmax is a few passes over long rows; and the second product, still in the cache, is added to the result.
"""

from __future__ import annotations

import torch

MAX_KEYS = 16
_PIECE = 256  # queries at a time: with 1280 numbers each, a megabyte


def add_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    share: torch.Tensor | None = None,
) -> torch.Tensor:
    """out + share * softmax(q kT / sqrt(d)) v by heads, in place, without gradients.

    Args:
        out, q: (rows, queries, width), contiguous; d = width / heads.
        k, v: (rows, keys, width) in any float dtype.
        share: (rows or 1, queries, 1), what the result is multiplied by; None is 1.

    Returns:
        `out`. Scores, softmax and sums are fp32 (fp64 for fp64), a piece at a time; what is added is rounded once.
    """
    rows, queries, width = q.shape
    d, piece = width // heads, min(_PIECE, queries)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    def by_head(t: torch.Tensor) -> torch.Tensor:
        """(n, width) as (heads, n, d), where it lies."""
        return t.view(len(t), heads, d).transpose(0, 1)

    spaces = {
        n: tuple(q.new_empty(*size, dtype=dtype) for size in ((n, width), (heads, k.shape[1], n), (heads, n, d)))
        for n in {piece, queries % piece} - {0}
    }
    for row in range(rows):
        k_row = by_head(k[row].to(dtype) * d**-0.5).contiguous()
        v_row = by_head(v[row].to(dtype)).contiguous()
        for first in range(0, queries, piece):
            at = slice(first, min(first + piece, queries))
            here, scores, made = spaces[at.stop - first]
            torch.bmm(k_row, by_head(here.copy_(q[row, at])).transpose(1, 2), out=scores)
            shares = torch.softmax(scores, dim=1)
            if share is not None:
                shares *= share[row if len(share) > 1 else 0, at, 0].to(dtype)
            torch.bmm(shares.transpose(1, 2), v_row, out=made)
            out[row, at].view(len(here), heads, d).add_(made.transpose(0, 1))
    return out
