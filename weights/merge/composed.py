"""A few shared layers of two LoRAs at once, by their small matrices: each wide factor is read twice and written once.

The gauge (gauge.py), the masks (ziprank.py) and the even split of sizes are all products of a factor with a small
matrix. With the Grams D = A Aᵀ and U = Bᵀ B of a change B A and D = L Lᵀ, the rows L⁻¹ A are orthonormal, and the gauge
is (B L P) (Pᵀ L⁻¹ A), with P from the SVD of L_c⁻¹ (A_c A_sᵀ) L_s⁻ᵀ. So everything up to the masks is rank × rank work
in float64, for layers of equal ranks side by side, and one product a factor makes the result.

Grams are float32 products where the factors are well conditioned, else float64. A layer that even those cannot take,
since squaring would lose digits or a direction might be too small to keep, goes through `one_layer.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from ..lora.low_rank import LowRank
from .gauge import settle
from .one_layer import DROP, chance_overlap, figures
from .result import LayerReport
from .ziprank import DUAL_GAIN, Moments, masks_at, response_sizes, ridge_for

_WELL = 8.0  # ‖G‖‖G⁻¹‖ over the rank (1 for orthogonal rows) up to which a float32 Gram is exact to about 1e-4
_NEAR = 1e-4  # one minus the cosine of input directions that may be the same: those are joined in `ziprank.build`


class Pair(NamedTuple):
    """The factors of content and style of one layer as they are in the file, and the strengths that are not in them
    yet."""

    down_c: torch.Tensor
    up_c: torch.Tensor
    down_s: torch.Tensor
    up_s: torch.Tensor
    strengths: tuple[float, float]

    def wide(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The four factors to compute with. They are made twice, which takes less time than it takes to fetch those of
        many layers from memory again."""
        return [part.float().to(dtype) for part in self[:4]]


class _Grams(NamedTuple):
    """Of layers side by side, (layers, rank, rank) float64: content with itself, style with itself, content with
    style."""

    c: torch.Tensor
    s: torch.Tensor
    cs: torch.Tensor

    def of(self, chosen: list[int]) -> _Grams:
        return _Grams(*(part[chosen] for part in self))


class _Root(NamedTuple):
    """One LoRA's Cholesky root L of A Aᵀ, its inverse, the Gram Lᵀ (Bᵀ B) L of its directions, and how badly the worse
    of the two Grams is conditioned: ‖G‖_F ‖G⁻¹‖_F, infinite or NaN where there is no root."""

    lower: torch.Tensor
    inverse: torch.Tensor
    own: torch.Tensor
    spread: torch.Tensor


def merge_few(
    pairs: dict[Hashable, Pair], weights: torch.Tensor, separation: float, keep: bool, dtype: torch.dtype | None
) -> dict[Hashable, tuple[LowRank, LayerReport]]:
    """ZipRank fast, with the dual basis, of layers with equal ranks; without those that need the longer way.

    Args:
        weights: (layers, 2) float64, of the prior.
        separation: γ in [0, 1]. keep: keep-strength.
        dtype: of the merged factors; None: float32.
    """
    targets, each = list(pairs), list(pairs.values())
    downs, ups = _all_grams(each, torch.float32)
    roots = [_root(down, up) for down, up in zip(downs[:2], ups[:2])]
    rough = _beyond(roots, _WELL * max(downs.c.shape[-1], downs.s.shape[-1]))
    if rough:  # again, exactly
        for stacked, exact in zip((*downs, *ups), sum(_all_grams([each[i] for i in rough], torch.float64), ())):
            stacked[rough] = exact
        roots = [_root(down, up) for down, up in zip(downs[:2], ups[:2])]
    lost = set(_beyond(roots, DROP**-2))
    well = [index for index in range(len(each)) if index not in lost]
    if not well:
        return {}
    roots = [_Root(*(part[well] for part in root)) for root in roots]
    gauge = _Gauge.of(roots, downs.of(well), ups.of(well), torch.tensor([each[i].strengths for i in well]).double())
    masks = masks_at(
        gauge.moments, *weights[well].T[..., None], separation, keep, ridge_for(torch.float32), DUAL_GAIN
    )
    found = {}
    plan = _Plan.of(gauge, masks)
    for row, (index, figure) in enumerate(zip(well, figures(gauge.moments, masks))):
        if float(gauge.moments.cosines[row, 0]) < 1 - _NEAR:
            made = plan.carry_out(each[index], row, dtype)
            chance = chance_overlap(each[index].down_c, each[index].down_s)
            found[targets[index]] = made, LayerReport(rank=made.rank, chance=chance, **figure)
    return found


def _all_grams(each: list[Pair], dtype: torch.dtype) -> tuple[_Grams, _Grams]:
    """A Aᵀ and Bᵀ B, computed in that dtype."""
    downs, ups = [], []
    for pair in each:
        a, b, c, d = pair.wide(dtype)
        downs.append((a @ a.T, c @ c.T, a @ c.T))
        ups.append((b.T @ b, d.T @ d, b.T @ d))
    return tuple(_Grams(*(torch.stack(part).double() for part in zip(*grams))) for grams in (downs, ups))


def _root(down: torch.Tensor, up: torch.Tensor) -> _Root:
    """Args: the Grams of one LoRA's factors, (layers, rank, rank)."""
    lower, inverse, spread = _cholesky(down)
    own = lower.mT @ up @ lower
    return _Root(lower, inverse, own, torch.maximum(spread, _cholesky(own)[2]))


def _cholesky(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(L, L⁻¹, ‖G‖_F ‖G⁻¹‖_F)."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    spread = torch.linalg.matrix_norm(gram) * torch.linalg.matrix_norm(inverse.mT @ inverse)
    return lower, inverse, torch.where(failed == 0, spread, torch.inf)


def _beyond(roots: list[_Root], limit: float) -> list[int]:
    """Layers that are worse conditioned than this."""
    return (~((roots[0].spread <= limit) & (roots[1].spread <= limit))).nonzero().flatten().tolist()


class _Gauge(NamedTuple):
    """The small matrices of the gauge, (layers, rank, rank) float64: its rows are rows_k @ A_k, its columns B_k @
    columns_k, strengths included."""

    rows_c: torch.Tensor
    rows_s: torch.Tensor
    columns_c: torch.Tensor
    columns_s: torch.Tensor
    moments: Moments

    @classmethod
    def of(cls, roots: list[_Root], downs: _Grams, ups: _Grams, strengths: torch.Tensor) -> _Gauge:
        """Args: strengths (layers, 2)."""
        one, two = roots
        p, d, qh = torch.linalg.svd(one.inverse @ downs.cs @ two.inverse.mT, full_matrices=True)
        q, d = qh.mT.contiguous(), d.clamp(0.0, 1.0)
        s_c, s_s = strengths[:, 0, None, None], strengths[:, 1, None, None]
        own_c, own_s = s_c.square() * one.own, s_s.square() * two.own
        for row in range(len(d)):
            settle(own_c[row], own_s[row], p[row], q[row], d[row])
        n = d.shape[-1]
        across = one.lower.mT @ (s_c * s_s * ups.cs) @ two.lower
        alpha, beta = (p * (own_c @ p)).sum(-2), (q * (own_s @ q)).sum(-2)
        kappa = (p[..., :n] * (across @ q[..., :n])).sum(-2)
        columns = s_c * (one.lower @ p), s_s * (two.lower @ q)
        return cls(p.mT @ one.inverse, q.mT @ two.inverse, *columns, Moments(alpha, beta, kappa, d))


class _Plan(NamedTuple):
    """What is left to do with the wide factors, all small and float32, layers side by side.

    up_k = B_k @ columns_k; down_k = own_k · (rows_k @ A_k) + other_k · (the partner's rows), and of the stacked
    directions those that `kept` names.
    """

    rows_c: torch.Tensor
    rows_s: torch.Tensor
    columns_c: torch.Tensor
    columns_s: torch.Tensor
    own: torch.Tensor
    other_c: torch.Tensor
    other_s: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(cls, gauge: _Gauge, masks) -> _Plan:
        """Each direction's size split evenly over its two sides, as `ziprank.build` does."""
        m, r_c = gauge.moments, gauge.rows_c.shape[-1]
        left = torch.cat((m.alpha, m.beta), -1).clamp_min(0).sqrt()
        right = torch.cat(response_sizes(m, masks), -1).clamp_min(0).sqrt()
        size = left * right
        kept = size > 1e-6 * size.amax(-1, keepdim=True)
        root = torch.where(kept, (right / left).sqrt(), 1.0)
        n = m.cosines.shape[-1]
        own = torch.cat((masks.content, masks.style), -1) / root
        other_c, other_s = masks.cross_c / root[:, :n], masks.cross_s / root[:, r_c : r_c + n]
        columns = gauge.columns_c * root[:, None, :r_c], gauge.columns_s * root[:, None, r_c:]
        small = (gauge.rows_c, gauge.rows_s, *columns, own[..., None], other_c[..., None], other_s[..., None])
        return cls(*(part.float() for part in small), kept)

    def carry_out(self, pair: Pair, row: int, dtype: torch.dtype | None) -> LowRank:
        """The merged layer of that row."""
        rows_c, rows_s, columns_c, columns_s, own, other_c, other_s, kept = (part[row] for part in self)
        down_c, up_c, down_s, up_s = pair.wide(torch.float32)
        r_c, n = rows_c.shape[0], other_c.shape[0]
        content, style = rows_c @ down_c, rows_s @ down_s
        down, up = torch.empty(kept.numel(), content.shape[1]), torch.empty(len(up_c), kept.numel())
        for part, mine, partner, first, other in (
            (down[:r_c], content, style, own[:r_c], other_c),
            (down[r_c:], style, content, own[r_c:], other_s),
        ):
            torch.mul(mine, first, out=part)
            part[:n].addcmul_(partner[:n], other)
        torch.mm(up_c, columns_c, out=up[:, :r_c])
        torch.mm(up_s, columns_s, out=up[:, r_c:])
        if not bool(kept.all()):
            down, up = down[kept], up[:, kept]
        return LowRank(down, up) if dtype is None else LowRank(down.to(dtype), up.to(dtype))
