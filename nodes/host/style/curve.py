"""A list of weights as a picture: one point for each frame or step, the first, last and outermost ones in numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ..pictures import to_image

_INK, _FAINT, _PAPER, _LINE = (32, 36, 48), (120, 126, 140), (250, 250, 248), (150, 50, 122)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 320, 64, 24, 44, 44


def draw_curve(values: Sequence[float], title: str) -> torch.Tensor:
    """(1, height, width, 3), 0 to 1."""
    low, high = min(0.0, *values), max(1.0, *values)
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    small = ImageFont.load_default(12)

    def place(i: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (i / (len(values) - 1) if len(values) > 1 else 0.5)
        return x, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    pen.text((_LEFT, 12), title, font=font, fill=_INK)
    for value in sorted({low, 0.0, 1.0, high}):
        y = place(0, value)[1]
        pen.line((_LEFT, y, _WIDTH - _RIGHT, y), fill=(228, 228, 226))
        pen.text((_LEFT - 8, y), f"{value:.3g}", font=small, fill=_FAINT, anchor="rm")
    points = [place(i, value) for i, value in enumerate(values)]
    if len(points) > 1:
        pen.line(points, fill=_LINE, width=2)
    size = 3 if len(points) <= 120 else 1
    for x, y in points:
        pen.ellipse((x - size, y - size, x + size, y + size), fill=_LINE)
    for i, anchor in ((0, "la"), (len(points) - 1, "ra")) if len(points) > 1 else ((0, "ma"),):
        pen.text((points[i][0], _HEIGHT - _BOTTOM + 10), f"{i}: {values[i]:.3g}", font=small, fill=_INK, anchor=anchor)
    return to_image(picture)
