"""One LoRA from several pictures, and from several predictors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..errors import StyleLoomError
from ..lora.algebra import concatenate, truncate
from ..lora.low_rank import LowRank


def parse_weights(text: str, count: int) -> list[float]:
    """Weights of the pictures from what an artist types, made to sum to 1.

    Args:
        text: numbers separated by commas, spaces or lines; empty means equal weights.
        count: number of pictures.

    Raises:
        StyleLoomError: not numbers, another count, negative, not finite, or all 0.
    """
    words = text.replace(",", " ").replace(";", " ").split()
    if not words:
        return [1 / count] * count
    try:
        weights = [float(word) for word in words]
    except ValueError as error:
        raise StyleLoomError(
            f"image_weights is {text!r}",
            "numbers, such as: 1, 0.5, 2",
            "Write one number per picture, or leave it empty for equal weights.",
        ) from error
    if len(weights) != count:
        raise StyleLoomError(
            f"image_weights has {len(weights)} numbers for {count} pictures",
            f"{count} numbers",
            "Write one number per picture, in the order of the references, or leave it empty.",
        )
    if any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) == 0:
        raise StyleLoomError(
            f"image_weights is {text!r}", "numbers of 0 or more, not all of them 0", "Use 0 to leave a picture out."
        )
    total = sum(weights)
    return [w / total for w in weights]


def fuse_target(
    predicted: Sequence[Sequence[LowRank]],
    weights: Sequence[float],
    strength: float = 1.0,
    max_rank: int = 0,
    extra: LowRank | None = None,
) -> LowRank:
    """One target of the fused LoRA: ΔW = strength · (Σ_predictors Σ_i w_i ΔW_i + ΔW_extra), by concatenating ranks.

    With equal weights w_i = 1/N this is the published merge (`merge_lora` of DiffSynth-Studio): the mean over pictures,
    the sum over Coarse and Fine. The scale goes to `down` once, so that strength scales ΔW and not its square.

    Args:
        predicted: per predictor, one pair per picture: down (rank, in), up (out, rank), of one float dtype.
        weights: one per picture, summing to 1. Pictures of weight 0 take no rank.
        strength: scales ΔW.
        max_rank: 0 keeps the exact concatenation; else the best approximation of at most this rank.
        extra: the same target of a static LoRA that belongs to it (the bias), scaled by strength alone.

    Returns:
        LowRank of rank (number of predictors) · (pictures of weight > 0) · rank [+ that of extra], in memory of their
        own.
    """
    pairs, scales = [], []
    for pictures in predicted:
        for pair, weight in zip(pictures, weights, strict=True):
            if weight:
                pairs.append(pair)
                scales.append(strength * weight)
    if extra is not None:
        dtype = pairs[0].down.dtype
        pairs.append(LowRank(extra.down.to(dtype), extra.up.to(dtype)))
        scales.append(strength)
    pair = concatenate(pairs, scales)
    return truncate(pair, max_rank) if max_rank else pair


def check_bias(
    extra: dict[str, LowRank], rest: list[str], names: Sequence[str], widths: Callable[[str], tuple]
) -> None:
    """The bias LoRA must cover exactly the targets of the predictor.

    Args:
        extra, rest: from `split_pairs` of the bias LoRA.
        names: all targets of the predictor.
        widths: name → (in, out).

    Raises:
        StyleLoomError: with the count and the first names of what is missing, unknown or misshapen.
    """
    missing = [name for name in names if name not in extra]
    unknown = [name for name in extra if name not in set(names)] + rest
    wrong = [
        name for name in names if name in extra and (extra[name].down.shape[1], extra[name].up.shape[0]) != widths(name)
    ]
    for problem, keys in (
        ("lacks", missing),
        ("has additional keys, not of the predictor:", unknown),
        ("has other widths at", wrong),
    ):
        if keys:
            raise StyleLoomError(
                f"bias_lora {problem} {len(keys)} targets ({', '.join(keys[:3])})",
                f"a LoRA of exactly the predictor's {len(names)} targets, such as Qwen-Image-i2L-Bias.safetensors",
                "Load the bias that was published with the predictor, or leave bias_lora unconnected and apply the "
                "other LoRA to the model after this one.",
            )
