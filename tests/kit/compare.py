"""How far one picture is from another: in numbers, and side by side."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .lora_picture import to_image

_INK, _PAPER = (32, 36, 48), (250, 250, 248)
_SIDE, _GAP, _FOOT = 320, 16, 40


def measure(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """RMS of the difference, also as a share of the first picture's own contrast (RMS around its mean colour).

    Args:
        before, after: IMAGE (B, H, W, 3) of equal shape, 0..1.
    """
    if before.shape != after.shape:
        raise ValueError(f"pictures of different shapes: {tuple(before.shape)} and {tuple(after.shape)}")
    a, b = before.double(), after.double()
    difference = float((a - b).square().mean().sqrt())
    contrast = float((a - a.mean(dim=(0, 1, 2))).square().mean().sqrt())
    return {"rms": difference, "relative": difference / contrast if contrast else float("inf") if difference else 0.0,
            "largest": float((a - b).abs().max())}


def _panel(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    scale = max(1, round(_SIDE / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def draw(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Returns the first pictures of both batches and their difference as one IMAGE, and the numbers as a sentence."""
    found = measure(before, after)
    if found["largest"] == 0.0:
        text = "The two pictures are equal, bit by bit."
    else:
        text = (f"Moved by {100 * found['relative']:.1f} % of the picture's own contrast "
                f"(RMS difference {found['rms']:.4f}, largest {found['largest']:.3f}, on a scale of 0 to 1).")
    a, b = before[0].float().cpu().numpy(), after[0].float().cpu().numpy()
    gain = 0.5 / found["largest"] if found["largest"] else 0.0
    panels = [_panel(a), _panel(b), _panel(0.5 + gain * (b - a))]
    labels = ["first", "second", f"second minus first, {gain:.2g} times" if gain else "no difference"]
    width = sum(p.width for p in panels) + _GAP * 4
    sheet = Image.new("RGB", (width, panels[0].height + 2 * _GAP + 2 * _FOOT), _PAPER)
    pen, font, x = ImageDraw.Draw(sheet), ImageFont.load_default(size=16), _GAP
    for panel, label in zip(panels, labels):
        sheet.paste(panel, (x, _GAP))
        pen.text((x, _GAP + panel.height + 8), label, font=font, fill=_INK)
        x += panel.width + _GAP
    pen.text((_GAP, sheet.height - _FOOT), text, font=font, fill=_INK)
    return to_image(sheet), text
