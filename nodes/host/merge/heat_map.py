"""A merge as a picture: for each LoRA, how much of it is left in every layer, block by block; under it the loss
curve."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ....weights.merge.targets import key_of, slice_of
from ..pictures import to_image

_INK, _FAINT, _PAPER, _NONE = (32, 36, 48), (120, 126, 140), (250, 250, 248), (228, 228, 226)
# From "all gone" to "all there": grows in brightness, so also for colour-blind eyes.
_SCALE = np.array([(36, 18, 66), (84, 32, 120), (150, 50, 122), (212, 82, 96), (244, 140, 78), (252, 226, 150)], float)
_BLOCK = re.compile(r"^((?:.*?\.)?\w+\.\d+(?:\.\d+)?(?:\.transformer_blocks\.\d+)?)\.(.+)$")
_MAX_COLUMNS = 160


def place(target: Hashable) -> tuple[str, str]:
    """(block, layer) of a target: the column and the row of its cell."""
    name = key_of(target).removeprefix("diffusion_model.").removeprefix("name:").removesuffix(".weight")
    match = _BLOCK.match(name)
    block, layer = match.groups() if match else ("", name)
    part = slice_of(target)
    if part is not None:
        layer += f" {part[1]}+"
    return block, layer


def _natural(name: str) -> list:
    """Sorts numbers in names by their value: input_blocks.4 before input_blocks.10, input before middle and output."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def colour(value: float) -> tuple[int, int, int]:
    """0 → dark, 1 and above → light."""
    position = min(max(value, 0.0), 1.0) * (len(_SCALE) - 1)
    i = min(int(position), len(_SCALE) - 2)
    return tuple(int(round(v)) for v in _SCALE[i] + (position - i) * (_SCALE[i + 1] - _SCALE[i]))


def _panel(pen, font, small, title: str, cells, columns, rows, x0: int, y0: int, cw: int, ch: int) -> None:
    pen.text((x0, y0 - 26), title, font=font, fill=_INK)
    for j, row in enumerate(rows):
        pen.text((x0 - 8, y0 + (j + 0.5) * ch), row, font=small, fill=_INK, anchor="rm")
        for i, column in enumerate(columns):
            value = cells.get((column, row))
            fill = _NONE if value is None else colour(value)
            pen.rectangle((x0 + i * cw, y0 + j * ch, x0 + (i + 1) * cw - 2, y0 + (j + 1) * ch - 2), fill=fill)


def _marks(pen, small, columns: list[str], x0: int, y: int, cw: int) -> None:
    """Under the last panel: the names of the parts, at the first block of each."""
    last, free = None, [0.0, 0.0, 0.0]
    for i, column in enumerate(columns):
        part = column.split(".transformer_blocks")[0]
        if part == last:
            continue
        last, x = part, x0 + i * cw
        line = next((k for k, taken in enumerate(free) if x >= taken), None)
        if line is None:
            continue
        pen.line((x, y + 2, x, y + 8 + 14 * line), fill=_FAINT)
        pen.text((x + 2, y + 6 + 14 * line), part, font=small, fill=_FAINT)
        free[line] = x + small.getlength(part) + 10


def draw(
    titles: list[str], kept: Mapping[Hashable, tuple[float | None, ...]], headline: str, losses: list[float] = ()
) -> torch.Tensor:
    """The heat map as IMAGE (1, H, W, 3), float32 in 0..1.

    Args:
        titles: of the panels, one a LoRA.
        kept: for each target, how much of each LoRA is left (None: this LoRA has no such layer).
        headline: one line of text.
        losses: of a training run, drawn under the panels.
    """
    places = {target: place(target) for target in kept}
    columns = sorted({block for block, _ in places.values()}, key=_natural)[:_MAX_COLUMNS]
    rows = list(dict.fromkeys(layer for _, layer in places.values()))
    small, font, large = (ImageFont.load_default(size=size) for size in (12, 16, 20))
    left = 24 + int(max((small.getlength(row) for row in rows), default=0)) + 8
    cw = max(6, min(26, 1100 // max(1, len(columns))))
    ch = max(9, min(22, 300 // max(1, len(rows))))
    high = ch * len(rows) + 44
    curve = 150 if len(losses) > 1 else 0
    width = max(720, left + cw * len(columns) + 100)
    picture = Image.new("RGB", (width, 60 + high * len(titles) + 60 + curve), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((24, 16), headline, font=large, fill=_INK)
    for index, title in enumerate(titles):
        cells: dict[tuple[str, str], float] = {}
        for target, values in kept.items():
            if values[index] is not None:
                cells[places[target]] = values[index]
        _panel(pen, font, small, title, cells, columns, rows, left, 92 + index * high, cw, ch)
    bottom = 60 + high * len(titles)
    _marks(pen, small, columns, left, bottom - 6, cw)
    bar = left + cw * len(columns) + 24
    tall = max(40, high - 44)
    for k in range(tall):
        pen.line((bar, 92 + tall - 1 - k, bar + 14, 92 + tall - 1 - k), fill=colour(k / (tall - 1)))
    pen.text((bar + 20, 92), "all kept", font=small, fill=_INK)
    pen.text((bar + 20, 92 + tall), "none", font=small, fill=_INK, anchor="lb")
    if curve:
        loss_curve(
            pen, small, list(losses), (left, bottom + 56, left + max(360, cw * len(columns)), bottom + 44 + curve)
        )
    return to_image(picture)


def loss_curve(pen: ImageDraw.ImageDraw, font, losses: list[float], box: tuple[int, int, int, int]) -> None:
    """Losses from the first to the last step, in a box (left, top, right, bottom)."""
    x0, y0, x1, y1 = box
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    pen.rectangle(box, outline=_FAINT)
    points = [
        (x0 + (x1 - x0) * i / max(1, len(losses) - 1), y1 - 3 - (y1 - y0 - 6) * (loss - low) / span)
        for i, loss in enumerate(losses)
    ]
    pen.line(points, fill=(40, 90, 160), width=2)
    text = f"loss {losses[0]:.4g} to {losses[-1]:.4g}, lowest {low:.4g}"
    pen.text((x1 - 6, y0 + 4), text, font=font, fill=_INK, anchor="ra")
