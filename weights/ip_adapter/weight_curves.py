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


def _at(numbers: Sequence[float], timing: str, u: float) -> float:
    last = len(numbers) - 1
    if last == 0:
        return numbers[0]
    i = min(int(u * last), last - 1)
    return numbers[i] + (numbers[i + 1] - numbers[i]) * _eased(timing, u * last - i)


def as_text(values: Sequence[float]) -> str:
    """The numbers with commas, as they are typed."""
    return ", ".join(f"{value:.6g}" for value in values)
