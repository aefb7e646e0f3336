"""Weights that change from frame to frame, or over the schedule, from a few numbers and a timing.

The timings are those of cubiq/ComfyUI_IPAdapter_plus (`IPAdapterWeights`), which takes the first and the last number
only; here the numbers between them are key frames at equal distances. With two numbers both are the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ..errors import StyleLoomError

CUSTOM, LINEAR, EASE_IN_OUT, EASE_IN, EASE_OUT, RANDOM = (
    *("custom", "linear", "ease in-out", "ease in", "ease out"),
    "random",
)
TIMINGS = (LINEAR, CUSTOM, EASE_IN_OUT, EASE_IN, EASE_OUT, RANDOM)


def _eased(timing: str, u: float) -> float:
    """0 to 1 -> 0 to 1."""
    return {
        LINEAR: u,
        EASE_IN_OUT: (1 - math.cos(u * math.pi)) / 2,
        EASE_IN: math.sin(u * math.pi / 2),
        EASE_OUT: 1 - math.cos(u * math.pi / 2),
    }[timing]


def weight_curve(
    numbers: Sequence[float],
    timing: str,
    frames: int,
    start: int = 0,
    end: int = 9999,
    before: int = 0,
    after: int = 0,
    seed: int = 0,
) -> list[float]:
    """One weight for each frame.

    Args:
        numbers: key frames. timing: custom takes them as they are, one a frame; random draws between the first and the
            last one; the others run through them.
        frames: how many, 2 at least; not used by custom.
        start, end: the weights change from this frame to before that one, and stand still outside.
        before, after: further frames with the first and the last weight.

    Raises:
        StyleLoomError: no numbers; a start that is not before the end.
    """
    if not numbers:
        raise StyleLoomError("weights is empty", "numbers, such as: 1, 0", "Write a number or more.")
    if timing == CUSTOM:
        made = list(numbers)
    else:
        frames = max(frames, 2)
        end = min(end, frames)
        if start >= end:
            raise StyleLoomError(
                f"start_frame is {start}, and the change ends before frame {end} of {frames}",
                "a start before the end",
                "Lower start_frame, or raise frames and end_frame.",
            )
        span = end - start
        if timing == RANDOM:
            draw = random.Random(seed)
            middle = [numbers[0] + (numbers[-1] - numbers[0]) * draw.random() for _ in range(span)]
        else:
            middle = [_at(numbers, timing, i / (span - 1) if span > 1 else 1.0) for i in range(span)]
        made = [numbers[0]] * start + middle + [numbers[-1]] * (frames - end)
    return [made[0]] * before + made + [made[-1]] * after


FULL, SHIFT, ALTERNATE = "full batch", "shift batches", "alternate batches"
METHODS = (FULL, SHIFT, ALTERNATE)


def cross_fade(
    weights: Sequence[float], pictures: int, method: str, before: int = 0, after: int = 0
) -> tuple[list[float], list[int], list[int]]:
    """Weights of a whole animation through several pictures, and which two pictures each frame has.

    Args:
        weights: of one passage from a picture to the next. before, after: further frames, with the first and the last
            picture.
        method: full batch: each picture for one passage, no second one. shift batches: picture i fades into i + 1.
            alternate batches: the pictures of even place stay with the first and those of odd place with the second,
            so that each picture is in one place; every other passage is turned upside down.

    Returns:
        (weights of the first picture, places of the first picture, places of the second), each one a frame.

    Raises:
        StyleLoomError: fewer than two pictures to fade between.
    """
    if method != FULL and pictures < 2:
        raise StyleLoomError(
            f"method is {method}, and image has {pictures} pictures",
            "two pictures or more to fade between",
            "Connect a batch of pictures, or choose the method full batch.",
        )
    low, high = min(weights), max(weights)
    made, first, second = [], [], []
    for i in range(pictures if method == FULL else pictures - 1):
        turned = method == ALTERNATE and i % 2 == 1
        made += [high - (w - low) for w in weights] if turned else weights
        first += [i + 1 if turned else i] * len(weights)
        second += [i if turned else i + 1] * len(weights)
    if method == FULL:
        second = list(first)
    last = pictures - 1
    made = [made[0]] * before + made + [made[-1]] * after
    return made, [0] * before + first + [last] * after, [0] * before + second + [last] * after


def complement(weights: Sequence[float]) -> list[float]:
    """Of the second picture: the largest and the smallest weight together, minus each."""
    return [min(weights) + max(weights) - w for w in weights]


def _at(numbers: Sequence[float], timing: str, u: float) -> float:
    last = len(numbers) - 1
    if last == 0:
        return numbers[0]
    i = min(int(u * last), last - 1)
    return numbers[i] + (numbers[i + 1] - numbers[i]) * _eased(timing, u * last - i)


def as_text(values: Sequence[float]) -> str:
    """The numbers with commas, as they are typed."""
    return ", ".join(f"{value:.6g}" for value in values)
