"""A few shared layers of two LoRAs at once, by their small matrices: each wide factor is read twice and written once.

The gauge (gauge.py), the masks (ziprank.py) and the even split of sizes are all products of a factor with a small
matrix. With the Grams D = A Aᵀ and U = Bᵀ B of a change B A and D = L Lᵀ, the rows L⁻¹ A are orthonormal, and the gauge
is (B L P) (Pᵀ L⁻¹ A), with P from the SVD of L_c⁻¹ (A_c A_sᵀ) L_s⁻ᵀ. So everything up to the masks is rank × rank work
in float64, for layers of equal ranks side by side, and one product a factor makes the result.

Grams are float32 products where the factors are well conditioned, else float64. A layer that even those cannot take,
since squaring would lose digits or a direction might be too small to keep, goes through `one_layer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch

from ..lora.low_rank import LowRank
from ..parallel import Scratch
from .gauge import settle
from .one_layer import DROP, chance_overlap, figures
from .result import LayerReport
from .ziprank import DUAL_GAIN, Moments, masks_at, response_sizes, ridge_for

_WELL = 4.0  # tr G · tr G⁻¹ over rank² (1 for orthogonal rows) up to which a float32 Gram is exact to about 1e-4
_SMALL = 1e-5  # the least cosine whose square still has the digits that its direction needs
_NEAR = 1e-4  # one minus the cosine of input directions that may be the same: those are joined in `ziprank.build`


class Pair(NamedTuple):
    """The factors of content and style of one layer as they are in the file, and the strengths that are not in them
    yet."""

    down_c: torch.Tensor
    up_c: torch.Tensor
    down_s: torch.Tensor
    up_s: torch.Tensor
    strengths: tuple[float, float]

    def downs(self, dtype: torch.dtype, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """Both to compute with. They are made twice, which takes less time than it takes to fetch those of many layers
        from memory again."""
        return scratch.cast("down_c", self.down_c, dtype), scratch.cast("down_s", self.down_s, dtype)

    def ups(self, dtype: torch.dtype, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        return scratch.cast("up_c", self.up_c, dtype), scratch.cast("up_s", self.up_s, dtype)


class _Grams(NamedTuple):
    """Of layers side by side, (layers, rank, rank) float64: content with itself, style with itself, content with
    style."""

    c: torch.Tensor
    s: torch.Tensor
    cs: torch.Tensor

    @classmethod
    def of_downs(cls, each: list[Pair], dtype: torch.dtype, scratch: Scratch) -> _Grams:
        """A Aᵀ, computed in that dtype."""
        return cls._of(each, (pair.downs(dtype, scratch) for pair in each))

    @classmethod
    def of_ups(cls, each: list[Pair], dtype: torch.dtype, scratch: Scratch) -> _Grams:
        """Bᵀ B, computed in that dtype."""
        return cls._of(each, ([up.T for up in pair.ups(dtype, scratch)] for pair in each))

    @classmethod
    def _of(cls, each: list[Pair], rows: Iterable[Sequence[torch.Tensor]]) -> _Grams:
        r_c, r_s = len(each[0].down_c), len(each[0].down_s)
        sizes = (r_c, r_c), (r_s, r_s), (r_c, r_s)
        made = cls(*(torch.empty(len(each), *size, dtype=torch.float64) for size in sizes))
        for index, (a, b) in enumerate(rows):
            made.c[index], made.s[index], made.cs[index] = a @ a.T, b @ b.T, a @ b.T
        return made

    def chosen(self, layers: list[int]) -> _Grams:
        return _Grams(*(part[layers] for part in self))


class _Roots(NamedTuple):
    """One LoRA's Cholesky roots L of A Aᵀ, their inverses, and how badly A Aᵀ and Lᵀ (Bᵀ B) L, the Gram of its
    directions, are conditioned: tr G · tr G⁻¹, infinite or NaN where there is no root."""

    lower: torch.Tensor
    inverse: torch.Tensor
    of_down: torch.Tensor
    of_own: torch.Tensor

    @classmethod
    def of(cls, down: torch.Tensor, up: torch.Tensor) -> _Roots:
        """Args: its Grams. With U = R Rᵀ the trace of Lᵀ U L is that of U A Aᵀ, and that of its inverse ‖R⁻¹ L⁻ᵀ‖²."""
        lower, failed = torch.linalg.cholesky_ex(down)
        upper, no_upper = torch.linalg.cholesky_ex(up)
        eye = torch.eye(down.shape[-1], dtype=down.dtype).expand_as(down)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        undone = torch.linalg.solve_triangular(upper, inverse.mT, upper=False)
        of_down = down.diagonal(dim1=-2, dim2=-1).sum(-1) * inverse.square().sum((-2, -1))
        of_own = (down * up).sum((-2, -1)) * undone.square().sum((-2, -1))
        of_down = torch.where(failed == 0, of_down, torch.inf)
        return cls(lower, inverse, of_down, torch.where((failed == 0) & (no_upper == 0), of_own, torch.inf))


def merge_few(
    pairs: dict[Hashable, Pair],
    weights: torch.Tensor,
    separation: float,
    keep: bool,
    dtype: torch.dtype | None,
    scratch: Scratch | None = None,
) -> dict[Hashable, tuple[LowRank, LayerReport]]:
    """ZipRank fast, with the dual basis, of layers with equal ranks; without those that need the longer way.

    Args:
        weights: (layers, 2) float64, of the prior.
        separation: γ in [0, 1]. keep: keep-strength.
        dtype: of the merged factors; None: float32.
        scratch: to be used again by the next call.
    """
    targets, each, scratch = list(pairs), list(pairs.values()), scratch or Scratch()
    downs, ups = (grams(each, torch.float32, scratch) for grams in (_Grams.of_downs, _Grams.of_ups))
    roots = [_Roots.of(down, up) for down, up in zip(downs[:2], ups[:2])]
    limit = _WELL * max(downs.cs.shape[1:]) ** 2
    steep = _beyond(limit, *(root.of_down for root in roots))
    rough = _beyond(limit, *(part for root in roots for part in (root.of_down, root.of_own)))
    # Again, exactly. In trained LoRAs most often `up` alone falls off.
    for layers, stacked, grams in ((steep, downs, _Grams.of_downs), (rough, ups, _Grams.of_ups)):
        if layers:
            _put(stacked, layers, grams([each[index] for index in layers], torch.float64, scratch))
    if rough:
        for root, down, up in zip(roots, downs, ups):
            _put(root, rough, _Roots.of(down[rough], up[rough]))
    lost = set(_beyond(DROP**-2, *(part for root in roots for part in (root.of_down, root.of_own))))
    well = [index for index in range(len(each)) if index not in lost]
    if not well:
        return {}
    if lost:
        roots = [_Roots(*(part[well] for part in root)) for root in roots]
        downs, ups = downs.chosen(well), ups.chosen(well)
    gauge = _Gauge.of(roots, downs, ups, torch.tensor([each[index].strengths for index in well]).double())
    masks = masks_at(
        gauge.moments, *weights[well].T[..., None], separation, keep, ridge_for(torch.float32), DUAL_GAIN
    )
    found = {}
    plan = _Plan.of(gauge, masks)
    for row, (index, figure) in enumerate(zip(well, figures(gauge.moments, masks))):
        if float(gauge.moments.cosines[row, 0]) < 1 - _NEAR:
            made = plan.carry_out(each[index], row, dtype, scratch)
            chance = chance_overlap(each[index].down_c, each[index].down_s)
            found[targets[index]] = made, LayerReport(rank=made.rank, chance=chance, **figure)
    return found


def _put(stacked: Sequence[torch.Tensor], layers: list[int], made: Sequence[torch.Tensor]) -> None:
    for part, new in zip(stacked, made):
        part[layers] = new


def _beyond(limit: float, *spreads: torch.Tensor) -> list[int]:
    """Layers of which one number, (layers,) each, is not at most the limit; NaN is not."""
    return (~torch.stack([spread <= limit for spread in spreads]).all(0)).nonzero().flatten().tolist()


class _Gauge(NamedTuple):
    """The small matrices of the gauge, (layers, rank, rank) float64: its rows are rows_k @ A_k, its columns B_k @
    columns_k, strengths included."""

    rows_c: torch.Tensor
    rows_s: torch.Tensor
    columns_c: torch.Tensor
    columns_s: torch.Tensor
    moments: Moments

    @classmethod
    def of(cls, roots: list[_Roots], downs: _Grams, ups: _Grams, strengths: torch.Tensor) -> _Gauge:
        """Args: strengths (layers, 2)."""
        one, two = roots
        p, d, q = _principal(one.inverse @ downs.cs @ two.inverse.mT)
        s_c, s_s = strengths.T[..., None]
        for row in range(len(d)):
            grams = (
                _gram_behind(up[row], root.lower[row], strength)
                for strength, up, root in zip(strengths[row].tolist(), ups, roots)
            )
            settle(*grams, p[row], q[row], d[row])
        n = d.shape[-1]
        left, right = one.lower @ p, two.lower @ q
        alpha = s_c.square() * (left * (ups.c @ left)).sum(-2)
        beta = s_s.square() * (right * (ups.s @ right)).sum(-2)
        kappa = s_c * s_s * (left[..., :n] * (ups.cs @ right[..., :n])).sum(-2)
        columns = left.mul_(s_c[..., None]), right.mul_(s_s[..., None])
        return cls(p.mT @ one.inverse, q.mT @ two.inverse, *columns, Moments(alpha, beta, kappa, d))


def _gram_behind(up: torch.Tensor, lower: torch.Tensor, strength: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def gram(a: torch.Tensor) -> torch.Tensor:
        turned = strength * (lower @ a)
        return turned.T @ up @ turned

    return gram


def _principal(met: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P, d and Q with met = P diag(d) Qᵀ and all columns of P and Q, (layers, r_c, r_s).

    Square ones by the eigenvectors of met metᵀ, which takes half the time of an SVD. Where a cosine is so small that
    its square has lost the digits, and where the ranks differ, the SVD.
    """
    if met.shape[-2] != met.shape[-1]:
        return _svd(met)
    squared, p = torch.linalg.eigh(met @ met.mT)
    p, d = p.flip(-1), squared.flip(-1).clamp_min(0.0).sqrt()
    q = met.mT @ p / d[:, None].clamp_min(_SMALL)
    lost = (d[:, -1] < _SMALL).nonzero().flatten()
    if len(lost):
        p[lost], d[lost], q[lost] = _svd(met[lost])
    return p, d.clamp_max(1.0), q


def _svd(met: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p, d, qh = torch.linalg.svd(met, full_matrices=True)
    return p, d.clamp(0.0, 1.0), qh.mT.contiguous()


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

    def carry_out(self, pair: Pair, row: int, dtype: torch.dtype | None, scratch: Scratch) -> LowRank:
        """The merged layer of that row."""
        rows_c, rows_s, columns_c, columns_s, own, other_c, other_s, kept = (part[row] for part in self)
        (down_c, down_s), (up_c, up_s) = pair.downs(torch.float32, scratch), pair.ups(torch.float32, scratch)
        r_c, n, rank = rows_c.shape[0], other_c.shape[0], kept.numel()
        columns, out = down_c.shape[1], len(up_c)
        content = torch.mm(rows_c, down_c, out=scratch.empty("content", len(rows_c), columns))
        style = torch.mm(rows_s, down_s, out=scratch.empty("style", len(rows_s), columns))
        down, up = scratch.empty("down", rank, columns), scratch.empty("up", out, rank)
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
        return LowRank(*(part.to(dtype or torch.float32, copy=True) for part in (down, up)))
