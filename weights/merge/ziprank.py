"""ZipRank in closed form: one mask over the ranks of each LoRA, without images, prompts or a model.

The merged change is L(m) = Σᵢ aᵢ uᵢᶜ vᵢᶜᵀ + Σᵢ bᵢ uᵢˢ vᵢˢᵀ. ZipLoRA and DuoLoRA ask that it act as each LoRA alone on
that LoRA's inputs:

    minimise  p_c ‖(L(m) − L_c) X_c‖² + p_s ‖(L(m) − L_s) X_s‖²

The row space of a LoRA is the only trace of its inputs in the file (a gradient step adds layer inputs to the rows of
`down`), so X_k X_kᵀ is taken to be the projector onto it. In the gauge of the principal angles (gauge.py) the problem
falls apart into pairs, with α = ‖uᶜ‖², β = ‖uˢ‖², κ = uᶜ·uˢ and the cosine d:

    [ α (p_c + p_s d²)      κ d (p_c + p_s) ] [a]   [ p_c α + p_s κ d ]
    [ κ d (p_c + p_s)       β (p_c d² + p_s)] [b] = [ p_s β + p_c κ d ]         a, b in [0, 1]

Directions without a partner keep the mask 1.

A mask cannot take the partner's input out of a direction. So fast mode first replaces the two input directions of a
pair by their dual (biorthogonal) basis, which reads nothing of the partner's input: by the symmetric matrix with the
gain 1/(1 + d) on v_c + v_s and min(1/(1 − d), A) on v_c − v_s. The limit A keeps nearly parallel inputs from being
exaggerated. With s and t for the response of such a direction to its own and to the partner's input (1 and d for the
directions as they are) the same system has s and t in it:

    [ α (p_c s² + p_s t²)   κ s t (p_c + p_s)  ] [a]   [ p_c α s + p_s κ t ]
    [ κ s t (p_c + p_s)     β (p_c t² + p_s s²)] [b] = [ p_s β s + p_c κ t ]

With the separation γ the targets are L_c + (1 − γ) L_s on X_c and
L_s + (1 − γ) L_c on X_s, and the solution is 1 + γ (m − 1): γ = 0 is the plain sum, γ = 1 ZipLoRA's objective. A
weight p of 0 is no weight but a choice: that LoRA is left out of the layer, whatever γ is.

This solves a problem of ZipRank's shape; it is not DuoLoRA's training, and its published figures are not claimed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ..lora.algebra import ThinSVD
from ..lora.low_rank import LowRank
from .gauge import Gauge, principal_gauge

STRENGTH_GAIN = 1.25  # how far keep-strength may raise the masks
DUAL_GAIN = 2.0  # A: the largest gain of the dual basis of a pair of input directions


class Masks(NamedTuple):
    """content (…, r_c), style (…, r_s): float64; a leading axis stands for layers.

    With dual input directions a pair is [u_c u_s] [[content, cross_c], [cross_s, style]] [v_c; v_s], with cross_c and
    cross_s (…, pairs).
    """

    content: torch.Tensor
    style: torch.Tensor
    cross_c: torch.Tensor | None = None
    cross_s: torch.Tensor | None = None

    def responses(self, cosines: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the pairs make of the inputs: (content of content's, style of content's, content of style's, style of
        style's), each (…, pairs)."""
        n = cosines.shape[-1]
        a, b = self.content[..., :n], self.style[..., :n]
        c, s = (0.0, 0.0) if self.cross_c is None else (self.cross_c, self.cross_s)
        return a + c * cosines, s + b * cosines, a * cosines + c, s * cosines + b

    def scaled(self, factor: torch.Tensor) -> Masks:
        return Masks(*(None if part is None else part * factor for part in self))


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
    pairs, wide = gauge.cosines.numel(), torch.float64
    kappa = (gauge.up_c[:, :pairs] * gauge.up_s[:, :pairs]).sum(0, dtype=wide)
    alpha, beta = (up.square().sum(0, dtype=wide) for up in (gauge.up_c, gauge.up_s))
    return Moments(alpha, beta, kappa, gauge.cosines.double())


def stack(each: list[Moments]) -> Moments:
    """Moments of many layers as one, filled up with zeros."""
    return Moments(*(pad_sequence(list(column), batch_first=True) for column in zip(*each)))


def masks_of(masks: Masks, index: int, gauge: Gauge) -> Masks:
    """One layer's masks out of those of many, without what fills them up."""
    n = gauge.cosines.numel()
    crosses = (None if cross is None else cross[index, :n] for cross in masks[2:])
    return Masks(masks.content[index, : gauge.up_c.shape[1]], masks.style[index, : gauge.up_s.shape[1]], *crosses)


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


def dual_basis(cosines: torch.Tensor, dual_gain: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(k0, k1) of the symmetric matrix [[k0, k1], [k1, k0]] that makes the two input directions of a pair biorthogonal,
    as far as the gain allows; 1 leaves them as they are."""
    if dual_gain <= 1:
        return torch.ones_like(cosines), torch.zeros_like(cosines)
    together, apart = 1 / (1 + cosines), (1 / (1 - cosines).clamp_min(1e-12)).clamp_max(dual_gain)
    return (together + apart) / 2, (together - apart) / 2


def solve_masks(m: Moments, p_c=1.0, p_s=1.0, ridge: float = 1e-9, dual_gain: float = 1.0) -> Masks:
    """The masks at γ = 1.

    Args:
        p_c, p_s: weights of the two errors, numbers or (layers, 1); at least 0 and not both 0. A 0 leaves that LoRA out
            of the layer.
        ridge: relative; above the rounding of what the moments came from.
        dual_gain: A, the largest gain of the dual basis; 1 for masks alone.
    """
    p_c, p_s = (torch.as_tensor(p, dtype=torch.float64) for p in (p_c, p_s))
    a, b = torch.ones_like(m.alpha), torch.ones_like(m.beta)
    n, d, both = m.cosines.shape[-1], m.cosines, p_c + p_s
    k0, k1 = dual_basis(d, dual_gain)
    s, t = k0 + k1 * d, k1 + k0 * d
    alpha, beta, kappa = m.alpha[..., :n], m.beta[..., :n], m.kappa
    h11, h22 = alpha * (p_c * s * s + p_s * t * t), beta * (p_c * t * t + p_s * s * s)
    g1, g2 = p_c * alpha * s + p_s * kappa * t, p_s * beta * s + p_c * kappa * t
    a[..., :n], b[..., :n] = _best_in_box(h11, both * kappa * s * t, h22, g1, g2, ridge)
    c, e = a[..., :n] * k1, b[..., :n] * k1
    a[..., :n], b[..., :n] = a[..., :n] * k0, b[..., :n] * k0
    masks = Masks(a, b) if dual_gain <= 1 else Masks(a, b, c, e)
    return leave_out(masks, p_c, p_s)


def leave_out(masks: Masks, p_c: torch.Tensor, p_s: torch.Tensor) -> Masks:
    """Where a weight is 0: that LoRA's masks 0, and the other LoRA whole.

    Args:
        p_c, p_s: numbers or (layers, 1).
    """
    p_c, p_s = torch.as_tensor(p_c), torch.as_tensor(p_s)
    alone = (p_c == 0) | (p_s == 0)
    content, style = (torch.where(alone, (p > 0).double(), mask) for p, mask in zip((p_c, p_s), masks[:2]))
    return Masks(content, style, *(None if cross is None else torch.where(alone, 0.0, cross) for cross in masks[2:]))


def gains(m: Moments, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each LoRA is left on its own inputs: ⟨L(m), L_k⟩ over ‖L_k‖² there, (…,). 1 where nothing sags."""
    n = m.cosines.shape[-1]
    cc, sc, cs, ss = masks.responses(m.cosines)
    content = (cc * m.alpha[..., :n] + sc * m.kappa).sum(-1) + (masks.content * m.alpha)[..., n:].sum(-1)
    style = (ss * m.beta[..., :n] + cs * m.kappa).sum(-1) + (masks.style * m.beta)[..., n:].sum(-1)
    return content / m.alpha.sum(-1), style / m.beta.sum(-1)


def response_sizes(m: Moments, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared lengths of the merged input directions, content's (…, r_c) and style's (…, r_s)."""
    n, found = m.cosines.shape[-1], []
    for own, cross in ((masks.content, masks.cross_c), (masks.style, masks.cross_s)):
        squared = own.square()
        if cross is not None:
            squared[..., :n] += 2 * own[..., :n] * cross * m.cosines + cross.square()
        found.append(squared)
    return tuple(found)


def squared_sizes(m: Moments, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """(‖L(m)‖², ‖L_c + L_s‖²), (…,)."""
    n, d = m.cosines.shape[-1], m.cosines
    a, b = masks.content[..., :n], masks.style[..., :n]
    c, e = (0.0, 0.0) if masks.cross_c is None else (masks.cross_c, masks.cross_s)
    rows_c, rows_s = response_sizes(m, masks)
    merged = (m.alpha * rows_c).sum(-1) + (m.beta * rows_s).sum(-1)
    merged = merged + 2 * (m.kappa * (a * e + (a * b + c * e) * d + c * b)).sum(-1)
    return merged, m.alpha.sum(-1) + m.beta.sum(-1) + 2 * (m.kappa * d).sum(-1)


def keep_strength(m: Moments, masks: Masks) -> Masks:
    """Both masks raised by one factor a layer, at most `STRENGTH_GAIN`, where each error's fear of the other LoRA made
    them sag."""
    mean = sum(gains(m, masks)) / 2
    return masks.scaled(torch.where(mean > 0, 1 / mean, STRENGTH_GAIN).clamp(1.0, STRENGTH_GAIN)[..., None])


def own_loss(m: Moments, masks: Masks) -> torch.Tensor:
    """Mean over both LoRAs of ‖(L(m) − L_k) P_k‖² / ‖L_k‖², with P_k the projector onto its row space, (…,)."""
    n = m.cosines.shape[-1]
    cc, sc, cs, ss = masks.responses(m.cosines)
    alpha, beta, kappa = m.alpha[..., :n], m.beta[..., :n], m.kappa
    content = ((cc - 1).square() * alpha + 2 * (cc - 1) * sc * kappa + sc.square() * beta).sum(-1)
    style = ((ss - 1).square() * beta + 2 * (ss - 1) * cs * kappa + cs.square() * alpha).sum(-1)
    content = content + ((masks.content - 1).square() * m.alpha)[..., n:].sum(-1)
    style = style + ((masks.style - 1).square() * m.beta)[..., n:].sum(-1)
    return (content / m.alpha.sum(-1) + style / m.beta.sum(-1)) / 2


def ridge_for(dtype: torch.dtype) -> float:
    """Above the rounding of moments of factors of that dtype."""
    return 1e-9 if dtype == torch.float64 else 1e-6


def masks_at(m: Moments, p_c, p_s, separation: float, keep: bool, ridge: float, dual_gain: float = 1.0) -> Masks:
    """The masks at a separation γ in [0, 1], with keep-strength or without."""
    masks = solve_masks(m, p_c, p_s, ridge, dual_gain)
    if keep:
        masks = keep_strength(m, masks)
    return leave_out(separated(masks, separation), p_c, p_s)


def separated(masks: Masks, separation: float) -> Masks:
    """From the plain sum (0) to the masks (1), linearly."""
    crosses = (None if cross is None else separation * cross for cross in masks[2:])
    return Masks(*(1 + separation * (mask - 1) for mask in masks[:2]), *crosses)


def build(gauge: Gauge, masks: Masks) -> LowRank:
    """The masked sum of one layer, each direction's size split evenly over its two sides. Directions that are masked
    out are left out, and a pair with one input direction becomes one."""
    dtype, n = gauge.up_c.dtype, gauge.cosines.numel()
    up_c, up_s, down_c, down_s = gauge.up_c, gauge.up_s, gauge.down_c, gauge.down_s
    if masks.cross_c is None:
        up_c, up_s = up_c * masks.content.to(dtype), up_s * masks.style.to(dtype)
    else:  # the masks go to the input side, where the partner's direction is taken out
        down_c, down_s = down_c * masks.content[:, None].to(dtype), down_s * masks.style[:, None].to(dtype)
        down_c[:n] += masks.cross_c[:, None].to(dtype) * gauge.down_s[:n]
        down_s[:n] += masks.cross_s[:, None].to(dtype) * gauge.down_c[:n]
    same = gauge.cosines > 1 - (5e-7 if dtype == torch.float32 else 5e-15)
    if bool(same.any()):  # one input direction: what both put out goes into one
        own = (down_c[:n] * gauge.down_c[:n]).sum(1), (down_s[:n] * gauge.down_c[:n]).sum(1)
        up_c, down_c = up_c.clone(), down_c.clone()
        up_c[:, :n] = torch.where(same, own[0] * up_c[:, :n] + own[1] * up_s[:, :n], up_c[:, :n])
        down_c[:n] = torch.where(same[:, None], gauge.down_c[:n], down_c[:n])
        rest = torch.ones(up_s.shape[1], dtype=torch.bool)
        rest[:n] = ~same
        up_s, down_s = up_s[:, rest], down_s[rest]
    up, down = torch.cat((up_c, up_s), 1), torch.cat((down_c, down_s))
    left, right = up.norm(dim=0), down.norm(dim=1)
    keep = left * right > 1e-6 * (left * right).max()
    if not bool(keep.all()):
        up, down, left, right = up[:, keep], down[keep], left[keep], right[keep]
    root = (right / left).sqrt()
    return LowRank(down / root[:, None], up * root)


def merge_pair(
    content: ThinSVD,
    style: ThinSVD,
    p_c: float = 1.0,
    p_s: float = 1.0,
    separation: float = 1.0,
    keep: bool = True,
    dual_gain: float = 1.0,
) -> tuple[LowRank, Masks, Moments]:
    """ZipRank of one weight; `fast.py` does the same for whole LoRAs.

    Args:
        content, style: strengths included, at least rank 1 each.
        p_c, p_s: weights of the two errors (layer prior).
        separation: γ in [0, 1].
        keep: keep-strength.
        dual_gain: of the dual basis; 1 for masks alone.
    """
    gauge = principal_gauge(content, style)
    m = moments(gauge)
    masks = masks_at(m, p_c, p_s, separation, keep, ridge_for(gauge.up_c.dtype), dual_gain)
    return build(gauge, masks), masks, m
