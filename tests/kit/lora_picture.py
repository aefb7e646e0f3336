"""A LoRA as a picture: block × target, the brightness is ‖ΔW‖ = ‖B·A‖, found without ever forming ΔW."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
_PREFIXES = ("diffusion_model.", "transformer.", "lora_unet_")
_STEM = re.compile(r"^(?P<part>.*?)[._](?P<block>\d+)[._](?P<target>.*)$")

_INK, _FAINT, _PAPER = (32, 36, 48), (120, 126, 140), (250, 250, 248)
_SCALE = np.array([  # dark blue → teal → sand → light yellow: grows in brightness, also for colour-blind eyes
    (22, 24, 58), (30, 62, 110), (24, 108, 130), (62, 150, 128), (150, 184, 118), (232, 208, 122), (254, 244, 190)])


@dataclass(frozen=True)
class Target:
    part: str
    block: int
    name: str
    rank: int
    norm: float


def delta_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖B·A‖ (Frobenius) from the Gram matrices: ‖BA‖² = ⟨BᵀB, AAᵀ⟩, all (rank × rank), in float64.

    Args:
        a: (rank, in) or a convolution's (rank, in, kh, kw). b: (out, rank, …).
    """
    a, b = a.detach().flatten(1).double(), b.detach().flatten(1).double()
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def read(lora: dict[str, torch.Tensor]) -> list[Target]:
    """All A/B pairs of a LoRA dict; alpha is taken into account as the host does (times alpha / rank)."""
    targets = []
    for key, a in lora.items():
        for end_a, end_b in _PAIRS:
            if not key.endswith(end_a):
                continue
            stem = key[: -len(end_a)]
            b = lora.get(stem + end_b)
            if b is None:
                raise ValueError(f"the LoRA has {key} but not {stem}{end_b}")
            alpha = lora.get(stem + ".alpha")
            scale = 1.0 if alpha is None else abs(float(alpha)) / a.shape[0]
            for prefix in _PREFIXES:
                stem = stem.removeprefix(prefix)
            match = _STEM.match(stem)
            part, block, name = match.group("part", "block", "target") if match else (stem, "0", "")
            targets.append(Target(part, int(block), name, a.shape[0], scale * delta_norm(a, b)))
    if not targets:
        raise ValueError("no A/B pairs in this LoRA: expected keys that end in .lora_A.weight and .lora_B.weight")
    return targets


def _colour(t: float) -> tuple[int, int, int]:
    position = min(max(t, 0.0), 1.0) * (len(_SCALE) - 1)
    i = min(int(position), len(_SCALE) - 2)
    mixed = _SCALE[i] + (position - i) * (_SCALE[i + 1] - _SCALE[i])
    return tuple(int(round(v)) for v in mixed)


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def draw(lora: dict[str, torch.Tensor], width: int = 1000) -> tuple[Image.Image, str]:
    """Returns the picture (RGB, `width` or a little more) and its headline as text."""
    targets = read(lora)
    columns = sorted({(t.part, t.block) for t in targets}, key=lambda c: (_first(targets, c[0]), c[1]))
    rows = list(dict.fromkeys(re.sub(r"\d+", "#", t.name) if len(columns) < 8 else t.name for t in targets))
    if len(rows) > 40:  # names that hold further block numbers: those are summed up
        rows = list(dict.fromkeys(re.sub(r"\d+", "#", t.name) for t in targets))
    cells: dict[tuple, float] = {}
    for t in targets:
        row = t.name if t.name in rows else re.sub(r"\d+", "#", t.name)
        cells[row, (t.part, t.block)] = math.hypot(cells.get((row, (t.part, t.block)), 0.0), t.norm)
    top = max(cells.values()) or 1.0
    total = math.sqrt(sum(t.norm**2 for t in targets))
    ranks = sorted({t.rank for t in targets})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    # Plain letters only: the font that Pillow brings has no sign for a norm or a delta.
    headline = f"LoRA: {len(targets)} targets, rank {rank}, size of the whole change {total:.4g}"

    small, normal, large = _font(13), _font(15), _font(22)
    left = 24 + int(max(normal.getlength(r or "(all)") for r in rows)) + 12
    cell_w = max(6, (width - left - 110) // len(columns))
    cell_h = max(16, min(30, 620 // len(rows)))
    bars, head = 70, 86
    map_w, map_h = cell_w * len(columns), cell_h * len(rows)
    width, height = max(width, left + map_w + 110), head + bars + map_h + 76
    picture = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((24, 18), headline, font=large, fill=_INK)
    pen.text((24, 50), "Each cell: size of the change to one weight (Frobenius norm of B times A). "
             "Bars: all of a block together.", font=normal, fill=_FAINT)

    x0, y0 = left, head + bars
    by_block = {c: math.sqrt(sum(cells.get((r, c), 0.0) ** 2 for r in rows)) for c in columns}
    tallest = max(by_block.values()) or 1.0
    for i, column in enumerate(columns):
        x = x0 + i * cell_w
        bar = round((bars - 12) * by_block[column] / tallest)
        pen.rectangle((x, y0 - 6 - bar, x + cell_w - 2, y0 - 6), fill=(150, 160, 180))
        for j, row in enumerate(rows):
            y = y0 + j * cell_h
            norm = cells.get((row, column))
            fill = (226, 226, 224) if norm is None else _colour(norm / top)
            pen.rectangle((x, y, x + cell_w - 2, y + cell_h - 2), fill=fill)
    for j, row in enumerate(rows):
        pen.text((x0 - 12, y0 + (j + 0.5) * cell_h), row or "(all)", font=normal, fill=_INK, anchor="rm")

    line = taken = 0
    step = 1 if cell_w >= 22 else 5 if cell_w * 5 >= 30 else 10
    for i, (part, block) in enumerate(columns):
        if block % step == 0:
            pen.text((x0 + (i + 0.5) * cell_w, y0 + map_h + 12), str(block), font=small, fill=_FAINT, anchor="mm")
        if i == 0 or columns[i - 1][0] != part:
            x, name = x0 + i * cell_w, part or "block"
            room = sum(1 for c in columns if c[0] == part) * cell_w - 4
            line = 1 - line if x < taken else 0  # a name too long for its columns sends the next one a line down
            taken = x + small.getlength(name) + 8
            pen.line((x, y0 + map_h + 24, x + room, y0 + map_h + 24), fill=_FAINT)
            pen.text((x, y0 + map_h + 30 + 16 * line), name, font=small, fill=_INK)

    bar_x = x0 + map_w + 24
    for k in range(map_h):
        pen.line((bar_x, y0 + map_h - 1 - k, bar_x + 16, y0 + map_h - 1 - k), fill=_colour(k / max(1, map_h - 1)))
    pen.text((bar_x + 22, y0), f"{top:.3g}", font=small, fill=_INK)
    pen.text((bar_x + 22, y0 + map_h), "0", font=small, fill=_INK, anchor="lb")
    return picture, headline


def _first(targets: list[Target], part: str) -> int:
    return next(i for i, t in enumerate(targets) if t.part == part)


def to_image(picture: Image.Image) -> torch.Tensor:
    """PIL RGB → IMAGE (1, H, W, 3), float32 in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255.0)[None]
