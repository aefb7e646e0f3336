"""How strong each LoRA is in each step of a run, as a picture and in words."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from ....weights.row_adapters.rows import NEGATIVE, POSITIVE
from ..pictures import to_image
from .plan import NAMES, Plan
from .schedule import strengths_by_step

_INK, _FAINT, _PAPER, _NONE = (32, 36, 48), (120, 126, 140), (250, 250, 248), (228, 228, 226)
_COLOURS = {POSITIVE: (40, 90, 160), NEGATIVE: (190, 90, 30)}  # apart in brightness, too
_LEFT, _TOP, _HIGH, _GAP, _MOST = 24, 84, 56, 44, 40
_MOST_RUNS = 8  # of one strength in a line of words


@dataclass(frozen=True)
class Lane:
    """One LoRA of one side: its strength in each step that runs."""

    side: int
    title: str
    strengths: list[float]


def lanes_of(plan: Plan, model, sigmas: torch.Tensor, every: torch.Tensor) -> list[Lane]:
    """The LoRAs of a plan, the positive side first.

    Args:
        model: MODEL.
        sigmas: Of the steps that run, and where the last one ends.
        every: The same of all steps that `sigmas` is a part of.
    """
    return [
        Lane(side, f"{NAMES[side]} LoRA {number}" + (f" ({entry.name})" if entry.name else ""), strengths)
        for side in (POSITIVE, NEGATIVE)
        for number, entry in enumerate(plan.loras.get(side, ()), 1)
        if (strengths := strengths_by_step(entry, model, sigmas, every))
    ]


def in_words(lanes: list[Lane], first: int) -> list[str]:
    """One line a LoRA whose strength changes: `1 to 14: 0, 15 to 50: 0.8`; where it changes often, the first changes
    and the last. first: number of the first step that runs,
    counted from 0."""
    lines = []
    for lane in lanes:
        runs, at = [], first + 1
        for strength, run in itertools.groupby(f"{strength:g}" for strength in lane.strengths):
            last = at + len(list(run)) - 1
            runs.append(f"{at} to {last}: {strength}" if last > at else f"{at}: {strength}")
            at = last + 1
        if len(runs) > _MOST_RUNS:
            runs = [*runs[: _MOST_RUNS - 1], "…", runs[-1]]
        if len(runs) > 1:
            lines.append(f"{lane.title} by step: {', '.join(runs)}")
    return lines


def draw(lanes: list[Lane], sigmas: torch.Tensor, first: int, cfg: float) -> torch.Tensor:
    """The schedule as IMAGE (1, H, W, 3), float32 in 0..1: a lane for each LoRA, a column for each step.

    Args:
        lanes: From `lanes_of`; the first 40 are drawn.
        sigmas: Of the steps that run, and where the last one ends.
        first: Number of the first of these steps, counted from 0.
        cfg: For the headline.
    """
    shown = lanes[:_MOST]
    steps = max(0, len(sigmas) - 1)
    column = max(3, min(40, 880 // max(1, steps)))
    small, font, large = (ImageFont.load_default(size=size) for size in (12, 16, 20))
    width = max(720, 2 * _LEFT + 60 + column * steps)
    picture = Image.new("RGB", (width, _TOP + max(1, len(shown)) * (_HIGH + _GAP) + 60), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((_LEFT, 16), f"Strength of each LoRA by step: {steps} steps, cfg {cfg:g}", font=large, fill=_INK)
    if not shown:
        pen.text((_LEFT, _TOP), "No LoRA acts.", font=font, fill=_INK)
    most = max((abs(strength) for lane in shown for strength in lane.strengths), default=0.0) or 1.0
    left = _LEFT + 44
    for number, lane in enumerate(shown):
        _lane(pen, font, small, lane, (left, _TOP + number * (_HIGH + _GAP)), column, most)
    bottom = _TOP + max(1, len(shown)) * (_HIGH + _GAP) - _GAP + 22
    _axis(pen, small, sigmas, first, (left, bottom), column)
    if len(lanes) > len(shown):
        pen.text((_LEFT, bottom + 34), f"and {len(lanes) - len(shown)} more", font=small, fill=_FAINT)
    return to_image(picture)


def _lane(pen, font, small, lane: Lane, at: tuple[int, int], column: int, most: float) -> None:
    """Bars upwards from the lane's floor; from its middle where a strength is negative."""
    x0, y0 = at
    below = min(lane.strengths) < 0
    floor = y0 + _HIGH // 2 if below else y0 + _HIGH
    high = _HIGH // 2 if below else _HIGH
    pen.text((x0, y0 - 22), lane.title, font=font, fill=_COLOURS[lane.side])
    pen.rectangle((x0, y0, x0 + column * len(lane.strengths) - 1, y0 + _HIGH), fill=_NONE)
    for i, strength in enumerate(lane.strengths):
        tip = floor - round(high * strength / most)
        box = (x0 + i * column, min(tip, floor), x0 + (i + 1) * column - 2, max(tip, floor))
        if strength:
            pen.rectangle(box, fill=_COLOURS[lane.side])
    pen.line((x0, floor, x0 + column * len(lane.strengths) - 1, floor), fill=_FAINT)
    pen.text((x0 - 8, y0), f"{most:g}", font=small, fill=_INK, anchor="rm")
    pen.text((x0 - 8, floor), "0", font=small, fill=_INK, anchor="rm")
    if below:
        pen.text((x0 - 8, y0 + _HIGH), f"{-most:g}", font=small, fill=_INK, anchor="rm")


def _axis(pen, small, sigmas: torch.Tensor, first: int, at: tuple[int, int], column: int) -> None:
    """Numbers of steps, counted from 1, and under them the sigma at which each begins; as many as there is room for."""
    x0, y0 = at
    steps = len(sigmas) - 1
    every = max(1, -(-52 // column))
    for i in range(0, steps, every):
        x = x0 + (i + 0.5) * column
        pen.text((x, y0), str(first + i + 1), font=small, fill=_INK, anchor="mm")
        pen.text((x, y0 + 16), f"{float(sigmas[i]):.3g}", font=small, fill=_FAINT, anchor="mm")
    pen.text((x0 - 8, y0), "step", font=small, fill=_INK, anchor="rm")
    pen.text((x0 - 8, y0 + 16), "sigma", font=small, fill=_FAINT, anchor="rm")
