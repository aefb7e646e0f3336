"""Taking a concept out of a picture's CLIP embedding, before it is projected to image tokens.

z is the embedding as the encoder gives it (projected, not normalised), t a text's vector in the same space. Sources:
InstantStyle's repository (`neg_content_prompt`): z − s·t; IP-Composer (arXiv 2502.13951): projection on the space that
phrases of a concept span; MaskST (arXiv 2502.07466): the elements with the largest products are the content's. The
orthogonal forms follow from the algebra: P = Q Qᵀ with Q an orthonormal basis of the directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import StyleLoomError

INSTANTSTYLE, REJECTION, SUBSPACE, BANK = "instantstyle", "rejection", "subspace", "concept bank"
MASK_QUANTILE, MASK_MEANS = "mask (top fifth)", "mask (2-means)"
METHODS = (REJECTION, INSTANTSTYLE, SUBSPACE, BANK, MASK_QUANTILE, MASK_MEANS)
# Where a direction is what is worked with, and not a vector or its elements.
DIRECTIONAL = (REJECTION, SUBSPACE, BANK)
NEUTRAL = ("", "a photo", "an image", "a painting")  # what a text says that says nothing of the content

_QUANTILE = 0.8  # MaskST's for SDXL
_KEEP = 1e-3  # singular values below this share of the largest are noise
_ENERGY = 0.9  # share of a concept bank's energy that its directions keep
_VANISHED = 1e-2  # share of a direction that must be left after the style words are taken out of it


@dataclass(frozen=True)
class Options:
    """How to subtract: `strength` 0 leaves z as it is; for the others see `subtract`."""

    method: str = REJECTION
    strength: float = 1.0
    gap_correction: bool = True
    one_sided: bool = True
    renormalise: bool = False


def subtract(
    z: torch.Tensor,
    content: torch.Tensor,
    options: Options,
    protect: torch.Tensor | None = None,
    neutral: torch.Tensor | None = None,
) -> torch.Tensor:
    """z without the content.

    * instantstyle: z − s·t, exactly as published; several concepts: t is their mean.
    * rejection: z − s·(z·d̂)·d̂ along one direction, that of the concepts' mean.
    * subspace: z − s·D·a, a the least-squares coefficients of z in all directions D: the orthogonal projection.
    * concept bank: the same with the leading singular vectors of the phrases, as many as hold 90 % of their energy.
    * mask: z − s·(m ⊙ z), m the elements where ẑ ⊙ t̂ is largest: the top fifth, or the upper of two clusters.

    Args:
        z: (pictures, n), any float dtype. content: (concepts, n) text vectors.
        protect: (phrases, n) of style words, whose span is taken out of what is subtracted: D − S Sᵀ D.
        neutral: (phrases, n) of texts without content, needed for `gap_correction`: texts and pictures of CLIP lie
            apart by a constant offset, which their mean removes from the direction. For rejection, subspace, bank.
        options: `one_sided` never adds the opposite of a concept (coefficients below 0 count as 0; directions only);
            `renormalise` gives z′ the length of z.

    Returns:
        (pictures, n) in the dtype of z, computed in fp64.

    Raises:
        StyleLoomError: sizes that differ, a vector without length, content that the protected words contain.
    """
    if options.method not in METHODS:
        raise StyleLoomError(f"method is {options.method!r}", f"one of {', '.join(METHODS)}", "Choose one of the list.")
    if z.ndim != 2 or content.ndim != 2 or not len(content) or content.shape[1] != z.shape[1]:
        raise StyleLoomError(
            f"pictures are {list(z.shape)} and concepts {list(content.shape)}",
            "vectors of one length",
            "Use an image and a text encoder that were trained together.",
        )
    x, t = z.double(), content.double()
    style = None if protect is None or not len(protect) else _span(protect.double())
    if options.method == INSTANTSTYLE:
        result = x - options.strength * _without(t.mean(0, keepdim=True), style)
    elif options.method in DIRECTIONAL:
        if options.gap_correction:
            if neutral is None or not len(neutral):
                raise ValueError("gap_correction needs neutral texts")
            t = _checked(t - neutral.double().mean(0), t)
        basis = _directions(_without(_checked(t), style), options.method)
        part = _coefficients(x, basis, options.one_sided) @ basis
        result = x - options.strength * part
    else:
        t = _checked(_without(t.mean(0, keepdim=True), style))
        result = x - options.strength * _mask(x, t, options.method) * x
    if options.renormalise:
        result = result * (x.norm(dim=1, keepdim=True) / result.norm(dim=1, keepdim=True).clamp_min(1e-12))
    if not bool(result.isfinite().all()):
        raise StyleLoomError(
            "the result is not finite", "finite numbers", "The encoded picture or the text vectors hold NaN."
        )
    return result.to(z.dtype)


def cosines(z: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """(pictures, concepts) cosines in fp64, 0 where a vector has no length."""
    x, t = (v.double() / v.double().norm(dim=1, keepdim=True).clamp_min(1e-12) for v in (z, content))
    return x @ t.T


def _checked(t: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """t, unless one of its rows has no length, on its own or beside what it was before."""
    least = 1e-9 if before is None else _KEEP * before.norm(dim=1)
    if bool((t.norm(dim=1) <= least).any()):
        raise StyleLoomError(
            "a concept has no direction: its text vector is the neutral one",
            "words that name something to be seen",
            "Write what is to be taken out, for example: a cat. Or switch gap_correction off.",
        )
    return t


def _span(t: torch.Tensor) -> torch.Tensor:
    """(rank, n) orthonormal rows with the span of the rows of t."""
    _, s, v = torch.linalg.svd(t, full_matrices=False)
    return v[s > _KEEP * s[0]]


def _without(t: torch.Tensor, style: torch.Tensor | None) -> torch.Tensor:
    """t minus its part in the span of the style words."""
    if style is None:
        return t
    left = t - (t @ style.T) @ style
    if bool((left.norm(dim=1) < _VANISHED * t.norm(dim=1)).any()):
        raise StyleLoomError(
            "what content names, protect names too: nothing would be left to take out",
            "other words in protect than in content",
            "Take the words of the content out of protect.",
        )
    return left


def _directions(t: torch.Tensor, method: str) -> torch.Tensor:
    """(directions, n) of length one."""
    if method == REJECTION:
        unit = (t / t.norm(dim=1, keepdim=True)).mean(0, keepdim=True)
        return _checked(unit) / unit.norm()
    unit = t / t.norm(dim=1, keepdim=True)
    if method == SUBSPACE:
        return unit
    _, s, v = torch.linalg.svd(unit, full_matrices=False)
    share = (s**2).cumsum(0) / (s**2).sum()
    v = v[: int((share < _ENERGY).sum()) + 1]
    return v * torch.where((unit @ v.T).mean(0) < 0, -1.0, 1.0)[:, None]  # a singular vector has no sign of its own


def _coefficients(x: torch.Tensor, basis: torch.Tensor, one_sided: bool) -> torch.Tensor:
    """(pictures, directions) a with a·basis nearest to x; directions that repeat others share their part."""
    a = x @ torch.linalg.pinv(basis, rtol=_KEEP)
    return a.clamp_min(0) if one_sided else a


def _mask(x: torch.Tensor, t: torch.Tensor, method: str) -> torch.Tensor:
    """(pictures, n) of 0 and 1."""
    products = (x / x.norm(dim=1, keepdim=True)) * (t / t.norm())
    if method == MASK_QUANTILE:
        return (products > products.quantile(_QUANTILE, dim=1, keepdim=True)).to(x.dtype)
    return torch.stack([_upper_cluster(row) for row in products]).to(x.dtype)


def _upper_cluster(p: torch.Tensor) -> torch.Tensor:
    """The upper of the two clusters of numbers with the least squared distance to their means, found exactly: in one
    dimension it is a cut of the sorted numbers, so every cut is tried."""
    ordered, order = p.sort()
    n = torch.arange(1, len(p), dtype=p.dtype)
    left = ordered.cumsum(0)[:-1]
    right = ordered.sum() - left
    cut = int((left**2 / n + right**2 / (len(p) - n)).argmax()) + 1  # least within = most between
    chosen = torch.zeros(len(p), dtype=torch.bool)
    chosen[order[cut:]] = True
    return chosen


def describe(
    z: torch.Tensor, changed: torch.Tensor, content: torch.Tensor, concepts: list[str], options: Options, pair: str
) -> str:
    """The report: method, towers, and for each picture cosines to each concept and norms, before → after."""
    lines = [f"method: {options.method} at strength {options.strength:g}", f"towers: {pair}"]
    inert = [
        name
        for name, on in (("gap_correction", options.gap_correction), ("one_sided", options.one_sided))
        if on and options.method not in DIRECTIONAL
    ]
    if inert:
        lines.append(f"{' and '.join(inert)} do not count with this method, which works without a direction")
    before, after = cosines(z, content), cosines(changed, content)
    for i in range(len(z)):
        lines.append(f"picture {i + 1}: norm {float(z[i].float().norm()):.3f} → {float(changed[i].float().norm()):.3f}")
        lines += [
            f"  cosine to “{concept}”: {before[i, j]:+.3f} → {after[i, j]:+.3f}" for j, concept in enumerate(concepts)
        ]
    return "\n".join(lines)
