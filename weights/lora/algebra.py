"""Exact algebra on factors; the change `up @ down` itself is never formed."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from .low_rank import LowRank


def frobenius_norm(pair: LowRank) -> float:
    """‖up·down‖_F, from the two rank×rank Grams: ‖BA‖² = tr((BᵀB)(AAᵀ)). Computed in fp32 or better."""
    down, up = (t if t.dtype == torch.float64 else t.float() for t in (pair.down, pair.up))
    squared = ((up.T @ up) * (down @ down.T)).sum()
    return float(squared.clamp_min(0).sqrt()) * abs(pair.scale)


def cut(pair: LowRank, max_rank: int = 0, energy: float = 1.0) -> tuple[LowRank, float]:
    """The best approximation of `up @ down` in the Frobenius norm (Eckart-Young) that has at most `max_rank` ranks and
    drops the smallest directions as long as the share `energy` of ‖up·down‖² remains.

    Args:
        pair: down (rank, in), up (out, rank).
        max_rank: 0 for no limit.
        energy: above 0; 1 keeps all.

    Returns:
        (LowRank of the input's dtype, with the root of the singular values on each side; the share of the squared norm
        that it keeps). A pair with nothing to cut comes back as it is.
    """
    if energy >= 1 and (not max_rank or pair.rank <= max_rank):
        return pair, 1.0
    svd = thin_svd(*pair.factors())
    if not svd.values.numel():
        return replace(pair, down=pair.down[:0], up=pair.up[:, :0]), 1.0
    power = svd.values.double().square()
    share = power.cumsum(0) / power.sum()
    k = int((share < energy - 1e-12).sum()) + 1 if energy < 1 else svd.values.numel()
    k = max(1, min(k, svd.values.numel(), max_rank or k))
    small = svd.low_rank(rank=k)
    dtype = pair.down.dtype
    return replace(pair, down=small.down.to(dtype), up=small.up.to(dtype), scale=1.0), float(share[k - 1])


def truncate(pair: LowRank, max_rank: int) -> LowRank:
    """`cut` at a rank of at least 1."""
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    return cut(pair, max_rank)[0]


def concatenate(pairs: list[LowRank], scales: list[float]) -> LowRank:
    """Σ scaleᵢ·upᵢ·downᵢ as one pair of rank Σ rankᵢ. Scales go to `down`, in fp32 with one rounding to its dtype."""
    scales = [scale * pair.scale for pair, scale in zip(pairs, scales, strict=True)]
    # bf16 times a Python number is computed in fp32 and rounded once.
    if all(scale == scales[0] for scale in scales):
        down = torch.cat([p.down for p in pairs]).mul_(scales[0])
    else:
        down = torch.cat([p.down * scale for p, scale in zip(pairs, scales)])
    return LowRank(down, torch.cat([p.up for p in pairs], dim=1))


class ThinSVD(NamedTuple):
    """`up · diag(values) · down`: up (out, k) with orthonormal columns, values (k,) falling, down (k, in) with
    orthonormal rows; k is the numerical rank."""

    down: torch.Tensor
    values: torch.Tensor
    up: torch.Tensor

    def low_rank(self, kernel: tuple[int, ...] = (), rank: int | None = None) -> LowRank:
        """The first `rank` directions (None: all), with the root of the values on each side, which is what half
        precision keeps best."""
        root = self.values[:rank].sqrt()
        return LowRank(root[:, None] * self.down[:rank], self.up[:, :rank] * root, kernel)


def thin_svd(down: torch.Tensor, up: torch.Tensor, drop: float = 1e-6) -> ThinSVD:
    """The SVD of `up @ down`; the product itself is not formed.

    Float64 factors, and any whose rows are nearly dependent, go through two QR decompositions and the SVD of a rank ×
    rank matrix. Well conditioned float32 factors take a way that is a third shorter: with down·downᵀ = L Lᵀ, the
    eigenvectors W of Lᵀ (upᵀ up) L give the right singular vectors Wᵀ L⁻¹ down, all small matrices in float64.

    Args:
        down: (rank, in). up: (out, rank). Float32 or float64.
        drop: directions below this share of the largest singular value are left out (they are rounding).
    """
    if down.dtype == torch.float32 and down.shape[0] <= down.shape[1]:
        found = _by_grams(down, up, drop)
        if found is not None:
            return found
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    k = int((s > drop * s[0]).sum()) if s.numel() and float(s[0]) > 0 else 0
    return ThinSVD(vh[:k] @ q_down.T, s[:k], q_up @ u[:, :k])


def _by_grams(down: torch.Tensor, up: torch.Tensor, drop: float) -> ThinSVD | None:
    """As `thin_svd`; None where squaring would lose digits: rows or singular values that lie further apart than 10⁴."""
    wide, tall = down.double(), up.double()
    root, failed = torch.linalg.cholesky_ex(wide @ wide.T)
    edge = root.diagonal()
    if int(failed) or not float(edge.min()) > 1e-4 * float(edge.max()):
        return None
    squared, w = torch.linalg.eigh(root.T @ (tall.T @ tall) @ root)
    if not float(squared[0]) > 1e-8 * float(squared[-1]):
        return None
    s, w = squared.sqrt().flip(0), w.flip(1)
    k = int((s > drop * s[0]).sum())
    s, w = s[:k], w[:, :k]
    rows = torch.linalg.solve_triangular(root.T, w, upper=True).T.to(down.dtype) @ down
    return ThinSVD(rows, s.to(down.dtype), up @ (root @ w / s).to(up.dtype))
