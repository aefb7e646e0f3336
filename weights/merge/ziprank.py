"""ZipRank in closed form: one mask over the ranks of each LoRA, without images, prompts or a model.

The merged change is L(m) = Σᵢ aᵢ uᵢᶜ vᵢᶜᵀ + Σᵢ bᵢ uᵢˢ vᵢˢᵀ. ZipLoRA and DuoLoRA ask that it act as each LoRA alone on
that LoRA's inputs:

    minimise  p_c ‖(L(m) − L_c) X_c‖² + p_s ‖(L(m) − L_s) X_s‖²

The row space of a LoRA is the only trace of its inputs in the file (a gradient step adds layer inputs to the rows of
`down`), so X_k X_kᵀ is taken to be the projector onto it. In the gauge of the principal angles (gauge.py) the problem
falls apart into pairs, with α = ‖uᶜ‖², β = ‖uˢ‖², κ = uᶜ·uˢ and the cosine d:

    [ α (p_c + p_s d²)      κ d (p_c + p_s) ] [a]   [ p_c α + p_s κ d ]
    [ κ d (p_c + p_s)       β (p_c d² + p_s)] [b] = [ p_s β + p_c κ d ]         a, b in [0, 1]

Directions without a partner keep the mask 1. With the separation γ the targets are L_c + (1 − γ) L_s on X_c and
L_s + (1 − γ) L_c on X_s, and the solution is 1 + γ (m − 1): γ = 0 is the plain sum, γ = 1 ZipLoRA's objective.

This solves a problem of ZipRank's shape; it is not DuoLoRA's training, and its published figures are not claimed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ..lora.algebra import ThinSVD
from ..lora.factors import Factors
from .gauge import Gauge, principal_gauge

MAX_GAIN = 1.25  # how far keep-strength may raise the masks


class Masks(NamedTuple):
    """content (…, r_c), style (…, r_s): float64; a leading axis stands for layers."""

    content: torch.Tensor
    style: torch.Tensor


class Moments(NamedTuple):
    """The numbers that pairs are solved from, float64: alpha (…, r_c), beta (…, r_s), kappa and cosines (…, pairs).

    Layers of different ranks stand side by side filled up with zeros, which weigh nothing.
    """

    alpha: torch.Tensor
    beta: torch.Tensor
    kappa: torch.Tensor
    cosines: torch.Tensor


def moments(gauge: Gauge) -> Moments:
    """α, β, κ and d of a gauge."""
    pairs = gauge.cosines.numel()
    up_c, up_s = gauge.up_c.double(), gauge.up_s.double()
    kappa = (up_c[:, :pairs] * up_s[:, :pairs]).sum(0)
    return Moments(up_c.square().sum(0), up_s.square().sum(0), kappa, gauge.cosines.double())


def stack(each: list[Moments]) -> Moments:
    """Moments of many layers as one, filled up with zeros."""
    return Moments(*(pad_sequence(list(column), batch_first=True) for column in zip(*each)))


def _best_in_box(h11, h12, h22, g1, g2, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """argmin ½ xᵀHx − gᵀx over [0, 1]², for many 2 × 2 systems at once: the interior, else the best of four edges.

    The ridge, relative to each diagonal entry, pulls towards the plain sum (1, 1): it decides where two directions are
    the same, and is nothing elsewhere.
    """
    tiny = torch.finfo(h11.dtype).tiny
    slack1, slack2 = ridge * h11 + tiny, ridge * h22 + tiny
    h11, h22, g1, g2 = h11 + slack1, h22 + slack2, g1 + slack1, g2 + slack2
    det = h11 * h22 - h12 * h12
    a, b = (g1 * h22 - g2 * h12) / det, (g2 * h11 - g1 * h12) / det
    inside = (a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)
    zero, one = torch.zeros_like(h11), torch.ones_like(h11)
    x = torch.stack((zero, one, (g1 / h11).clamp(0, 1), ((g1 - h12) / h11).clamp(0, 1)))
    y = torch.stack(((g2 / h22).clamp(0, 1), ((g2 - h12) / h22).clamp(0, 1), zero, one))
    value = 0.5 * (h11 * x * x + h22 * y * y) + h12 * x * y - g1 * x - g2 * y
    best = value.argmin(0, keepdim=True)
    return torch.where(inside, a, x.gather(0, best)[0]), torch.where(inside, b, y.gather(0, best)[0])


def solve_masks(m: Moments, p_c=1.0, p_s=1.0, ridge: float = 1e-9) -> Masks:
    """The masks at γ = 1.

    Args:
        p_c, p_s: weights of the two errors, numbers or (layers, 1); at least 0 and not both 0. A 0 leaves that LoRA out
            of the layer.
        ridge: relative; above the rounding of what the moments came from.
    """
    p_c, p_s = (torch.as_tensor(p, dtype=torch.float64) for p in (p_c, p_s))
    a, b = torch.ones_like(m.alpha), torch.ones_like(m.beta)
    n, d, both = m.cosines.shape[-1], m.cosines, p_c + p_s
    alpha, beta, kd = m.alpha[..., :n], m.beta[..., :n], m.kappa * m.cosines
    h11, h22 = alpha * (p_c + p_s * d * d), beta * (p_c * d * d + p_s)
    a[..., :n], b[..., :n] = _best_in_box(h11, both * kd, h22, p_c * alpha + p_s * kd, p_s * beta + p_c * kd, ridge)
    alone = (p_c == 0) | (p_s == 0)
    return Masks(torch.where(alone, (p_c > 0).double(), a), torch.where(alone, (p_s > 0).double(), b))


def gains(m: Moments, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each LoRA is left on its own inputs: ⟨L(m), L_k⟩ over ‖L_k‖² there, (…,). 1 where nothing sags."""
    n = m.cosines.shape[-1]
    kd = m.kappa * m.cosines
    content = (masks.content * m.alpha).sum(-1) + (masks.style[..., :n] * kd).sum(-1)
    style = (masks.style * m.beta).sum(-1) + (masks.content[..., :n] * kd).sum(-1)
    return content / m.alpha.sum(-1), style / m.beta.sum(-1)


def keep_strength(m: Moments, masks: Masks) -> Masks:
    """Both masks raised by one factor a layer, at most `MAX_GAIN`, where each error's fear of the other LoRA made them
    sag."""
    mean = sum(gains(m, masks)) / 2
    factor = torch.where(mean > 0, 1 / mean, MAX_GAIN).clamp(1.0, MAX_GAIN)[..., None]
    return Masks(masks.content * factor, masks.style * factor)


def own_loss(m: Moments, masks: Masks) -> torch.Tensor:
    """Mean over both LoRAs of ‖(L(m) − L_k) P_k‖² / ‖L_k‖², with P_k the projector onto its row space, (…,)."""
    n, d2 = m.cosines.shape[-1], m.cosines.square()
    kd = m.kappa * m.cosines
    da, db = masks.content - 1, masks.style - 1
    a, b = masks.content[..., :n], masks.style[..., :n]
    content = (da.square() * m.alpha).sum(-1) + (2 * da[..., :n] * b * kd + b * b * m.beta[..., :n] * d2).sum(-1)
    style = (db.square() * m.beta).sum(-1) + (2 * db[..., :n] * a * kd + a * a * m.alpha[..., :n] * d2).sum(-1)
    return (content / m.alpha.sum(-1) + style / m.beta.sum(-1)) / 2


def ridge_for(dtype: torch.dtype) -> float:
    """Above the rounding of moments of factors of that dtype."""
    return 1e-9 if dtype == torch.float64 else 1e-6


def masks_at(m: Moments, p_c, p_s, separation: float, keep: bool, ridge: float) -> Masks:
    """The masks at a separation γ in [0, 1], with keep-strength or without; a prior of 0 is left alone by it."""
    masks = solve_masks(m, p_c, p_s, ridge)
    if keep:
        alone = (torch.as_tensor(p_c) == 0) | (torch.as_tensor(p_s) == 0)
        masks = Masks(*(torch.where(alone, old, new) for old, new in zip(masks, keep_strength(m, masks))))
    return Masks(*(1 + separation * (mask - 1) for mask in masks))


def build(gauge: Gauge, masks: Masks) -> Factors:
    """The masked sum of one layer, each direction's size split evenly over its two sides. Directions that are masked
    out are left out, and a pair with one input direction becomes one."""
    dtype, n = gauge.up_c.dtype, gauge.cosines.numel()
    up_c, up_s = gauge.up_c * masks.content.to(dtype), gauge.up_s * masks.style.to(dtype)
    down_s = gauge.down_s
    same = gauge.cosines > 1 - (5e-7 if dtype == torch.float32 else 5e-15)
    if bool(same.any()):
        up_c[:, :n] += torch.where(same, gauge.cosines, 0) * up_s[:, :n]
        rest = torch.ones(up_s.shape[1], dtype=torch.bool)
        rest[:n] = ~same
        up_s, down_s = up_s[:, rest], down_s[rest]
    up, down = torch.cat((up_c, up_s), 1), torch.cat((gauge.down_c, down_s))
    norm = up.norm(dim=0)
    keep = norm > 1e-6 * norm.max()
    if not bool(keep.all()):
        up, down, norm = up[:, keep], down[keep], norm[keep]
    root = norm.sqrt()
    return Factors(down * root[:, None], up / root)


def merge_pair(
    content: ThinSVD, style: ThinSVD, p_c: float = 1.0, p_s: float = 1.0, separation: float = 1.0, keep: bool = True
) -> tuple[Factors, Masks, Moments]:
    """ZipRank of one weight; `fast.py` does the same for many at once.

    Args:
        content, style: strengths included, at least rank 1 each.
        p_c, p_s: weights of the two errors (layer prior).
        separation: γ in [0, 1].
        keep: keep-strength.
    """
    gauge = principal_gauge(content, style)
    m = moments(gauge)
    masks = masks_at(m, p_c, p_s, separation, keep, ridge_for(gauge.up_c.dtype))
    return build(gauge, masks), masks, m
