"""Two LoRAs of one weight in the gauge of the principal angles between their input spaces.

L = Σᵢ uᵢ vᵢᵀ is not unique: any invertible rank × rank matrix may stand between `up` and `down`. With orthonormal bases
V_c, V_s of both row spaces and V_c V_sᵀ = P diag(d) Qᵀ, turning the bases by P and Q makes content direction i meet
style direction i alone on the input side, at the cosine dᵢ. Then index i of one LoRA means something to the other, and
a mask over ranks does not depend on how a trainer happened to factor its matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..lora.algebra import ThinSVD

_SAME = 1e-5  # cosines closer than this count as one: any rotation among them is as good as any other


class Gauge(NamedTuple):
    """Content = up_c @ down_c, style = up_s @ down_s, rows of each `down` orthonormal, and
    down_c @ down_sᵀ = diag(cosines) for the first `cosines.numel()` rows of each, 0 elsewhere.

    up_c (out, r_c), down_c (r_c, in), up_s (out, r_s), down_s (r_s, in), cosines (min(r_c, r_s),) in [0, 1], falling.
    """

    up_c: torch.Tensor
    down_c: torch.Tensor
    up_s: torch.Tensor
    down_s: torch.Tensor
    cosines: torch.Tensor


def _clusters(values: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of at least two equal cosines above zero, as (first, behind the last)."""
    gaps = (values[:-1] - values[1:] > _SAME).tolist() if values.numel() > 1 else []
    runs, start = [], 0
    for i in range(values.numel()):
        if i == values.numel() - 1 or gaps[i]:
            if i > start and float(values[start]) > _SAME:
                runs.append((start, i + 1))
            start = i + 1
    return runs


def settle(
    gram_c: Callable[[torch.Tensor], torch.Tensor],
    gram_s: Callable[[torch.Tensor], torch.Tensor],
    p: torch.Tensor,
    q: torch.Tensor,
    d: torch.Tensor,
) -> None:
    """Fix the rotation inside each run of equal cosines, in place, by the directions of up_cᵀup_c + up_sᵀup_s there:
    the one choice that depends on nothing but the two changes and is the same when they swap roles.

    Args:
        gram_c, gram_s: some columns a of p or q, (rank, k) → (up a)ᵀ(up a), with `up` as it was before the turn.
        p, q: what turns them. d: the cosines.
    """
    for first, end in _clusters(d):
        a, b = p[:, first:end], q[:, first:end]
        _, turn = torch.linalg.eigh(gram_c(a) + gram_s(b))
        p[:, first:end] = a @ turn
        q[:, first:end] = b @ turn


def _gram_of(up: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def gram(a: torch.Tensor) -> torch.Tensor:
        turned = up @ a
        return turned.T @ turned

    return gram


def principal_gauge(content: ThinSVD, style: ThinSVD) -> Gauge:
    """Turn both LoRAs; neither product changes.

    Args:
        content, style: of equal in and out sizes, at least rank 1 each.
    """
    up_c, up_s = content.up * content.values, style.up * style.values
    p, d, qh = torch.linalg.svd(content.down @ style.down.T, full_matrices=True)
    q, d = qh.T.contiguous(), d.clamp(0.0, 1.0)
    settle(_gram_of(up_c), _gram_of(up_s), p, q, d)
    return Gauge(up_c @ p, p.T @ content.down, up_s @ q, q.T @ style.down, d)


def content_and_style(gauge: Gauge) -> tuple[ThinSVD, ThinSVD]:
    """The two changes of a gauge as `up · diag(values) · down` with orthonormal rows of `down`; the columns of `up`
    have length 1 but need not be orthogonal."""
    found = []
    for up, down in ((gauge.up_c, gauge.down_c), (gauge.up_s, gauge.down_s)):
        size = up.norm(dim=0)
        found.append(ThinSVD(down, size, up / size.clamp_min(torch.finfo(up.dtype).tiny)))
    return tuple(found)
