"""Exact algebra on factors; the change `up @ down` itself is never formed."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .low_rank import LowRank


def frobenius_norm(pair: LowRank) -> float:
    """‖up·down‖_F, from the two rank×rank Grams: ‖BA‖² = tr((BᵀB)(AAᵀ)). Computed in fp32 or better."""
    down, up = (t if t.dtype == torch.float64 else t.float() for t in (pair.down, pair.up))
    squared = ((up.T @ up) * (down @ down.T)).sum()
    return float(squared.clamp_min(0).sqrt()) * abs(pair.scale)


def truncate(pair: LowRank, max_rank: int) -> LowRank:
    """The best approximation of `up @ down` of at most `max_rank` in the Frobenius norm (Eckart-Young).

    With up = Q_b R_b and downᵀ = Q_a R_a, the SVD of the small R_b R_aᵀ is that of the product; its root goes to
    each side.

    Args:
        pair: down (rank, in), up (out, rank).
        max_rank: at least 1; a pair that is no larger comes back as it is.

    Returns:
        LowRank of the input's dtype.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    if pair.rank <= max_rank:
        return pair
    dtype = pair.down.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    q_up, r_up = torch.linalg.qr(pair.up.to(work) * pair.scale)
    q_down, r_down = torch.linalg.qr(pair.down.to(work).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    k = min(max_rank, s.numel())  # a factor can be longer than its matrix is wide
    root = s[:k].sqrt()
    up = q_up @ (u[:, :k] * root)
    down = (root[:, None] * vh[:k]) @ q_down.T
    return LowRank(down.to(dtype), up.to(dtype), pair.kernel, 1.0, pair.outputs, pair.inputs)


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

    def low_rank(self, kernel: tuple[int, ...] = ()) -> LowRank:
        """With the root of the values on each side, which is what half precision keeps best."""
        root = self.values.sqrt()
        return LowRank(root[:, None] * self.down, self.up * root, kernel)


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
