"""Several references made into one before they are projected, and a weight for each of them.

The ways of combining are those of cubiq/ComfyUI_IPAdapter_plus (`combine_embeds`), with one difference: its "norm
average" divides by a norm taken over the references, so that every number of the result is between minus one and
one however long the vectors are. Here the norm is that of each vector, and the result has their mean length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import StyleLoomError

AVERAGE, ADD, SUBTRACT, NORM_AVERAGE = "average", "add", "subtract", "norm average"
MAXIMUM, MINIMUM = "max", "min"
WAYS = (AVERAGE, ADD, SUBTRACT, NORM_AVERAGE, MAXIMUM, MINIMUM)


def parse_numbers(text: str, name: str) -> list[float]:
    """The numbers of a text, with commas, semicolons, blanks or line ends between; none for an empty one.

    Raises:
        StyleLoomError: something that is no number, or not finite.
    """
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise StyleLoomError(f"{name} is {text.strip()!r}", "numbers, such as: 1, 0.5, 0", "Write numbers and commas.")
    return numbers


def repeat_last(values: Sequence[float], count: int) -> list[float]:
    """`count` values: the last one again where there are fewer."""
    return [values[min(i, len(values) - 1)] for i in range(count)]


def combine(features: torch.Tensor, way: str, weights: Sequence[float] | None = None) -> torch.Tensor:
    """One reference out of several.

    Args:
        features: (pictures, width) or (pictures, tokens, width), any float dtype.
        way: one of `WAYS`. With z_i the features and w_i their weights:
            average: sum(w z) / sum(w). add: sum(w z). subtract: w_0 z_0 minus the mean of the other w_i z_i.
            norm average: the average of z_i / |z_i|, times the average of |z_i|; the norm is that of each vector.
            max, min: of w_i z_i, number by number.
        weights: one for each picture; None: all 1.

    Returns:
        fp32, the first axis 1. One picture of weight 1 is itself in every way.

    Raises:
        StyleLoomError: an average whose weights sum up to 0.
    """
    z = features.float()
    if way == AVERAGE and weights is None:
        return z.mean(0, keepdim=True)
    w = torch.ones(len(z)) if weights is None else torch.tensor(list(weights), dtype=torch.float32)
    w = w.to(z.device).view(-1, *[1] * (z.ndim - 1))
    if way in (AVERAGE, NORM_AVERAGE):
        total = w.sum()
        if abs(float(total)) < 1e-6:
            raise StyleLoomError(
                "the reference_weights of an average sum up to 0",
                "weights with a sum",
                "Change a weight, or choose the fusion add or subtract.",
            )
        w = w / total
        if way == AVERAGE:
            return (w * z).sum(0, keepdim=True)
        norm = z.norm(dim=-1, keepdim=True)
        unit = z / norm.clamp_min(torch.finfo(torch.float32).tiny)
        return (w * unit).sum(0, keepdim=True) * (w * norm).sum(0, keepdim=True)
    z = w * z
    if way == ADD:
        return z.sum(0, keepdim=True)
    if way == SUBTRACT:
        return z[:1] - z[1:].mean(0, keepdim=True) if len(z) > 1 else z
    if way in (MAXIMUM, MINIMUM):
        return (z.amax if way == MAXIMUM else z.amin)(0, keepdim=True)
    raise StyleLoomError(f"fusion is {way!r}", f"one of {', '.join(WAYS)}", "Choose one of the list.")
