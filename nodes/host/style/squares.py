"""Squares of a picture for an encoder that sees squares, what of them is masked, and where they lie on the picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ....weights.errors import StyleLoomError

CROP, PAD, TILES, TILED = "crop", "pad", "tiles", "tiled"
FITS = (CROP, PAD, TILES, TILED)
POSITIONS = ("middle", "top", "bottom", "left", "right")
# IPAdapter Tiled: between these ratios of height and width a picture counts as square; at most four squares in a row.
_NEARLY_SQUARE = (0.75, 1.33)
_MOST = 4
_PLACE = 256  # a square's side on the canvas of `places`

Cut = tuple[int, int, int, int]  # top, left, height, width


def cuts(height: int, width: int, fit: str, position: str = "middle") -> tuple[Cut, list[Cut]]:
    """(what of the picture is covered, its squares) in pixels.

    crop leaves the middle to the encoder, which cuts it out itself; tiles covers everything with the fewest squares,
    evenly spread. tiled takes four quarters of the middle square where height / width is between 0.75 and 1.33 (with
    an odd side they share a line), else a row of at most four squares in the middle.
    """
    whole: Cut = (0, 0, height, width)
    side, long = min(height, width), max(height, width)
    if fit == TILED and _NEARLY_SQUARE[0] < height / width < _NEARLY_SQUARE[1]:
        top, left, half = (height - side) // 2, (width - side) // 2, -(-side // 2)
        starts = (0, side - half)
        return (top, left, side, side), [(top + y, left + x, half, half) for y in starts for x in starts]
    if fit in (TILES, TILED) and height != width:
        first, span = 0, long
        if fit == TILED and long > _MOST * side:
            first, span = (long - _MOST * side) // 2, _MOST * side
        number = -(-span // side)
        starts = [first + round(i * (span - side) / (number - 1)) for i in range(number)]
        if height > width:
            return (first, 0, span, width), [(s, 0, side, side) for s in starts]
        return (0, first, height, span), [(0, s, side, side) for s in starts]
    if fit == CROP and position != "middle" and height != width:
        top = {"top": 0, "bottom": height - side}.get(position, (height - side) // 2)
        left = {"left": 0, "right": width - side}.get(position, (width - side) // 2)
        if (top, left) == ((height - side) // 2, (width - side) // 2):
            return whole, [whole]
        return (top, left, side, side), [(top, left, side, side)]
    return whole, [whole]


def squares(image: torch.Tensor, fit: str, mean: list[float], position: str = "middle") -> torch.Tensor:
    """Square pictures of what the encoder will look at.

    Args:
        image: (pictures, height, width, channels) 0 to 1; channels after the third are dropped.
        fit: pad adds borders of the encoder's mean colour, which it sees as nothing; the others: see `cuts`. The
            squares of a picture come in a row.
        mean: the encoder's mean colour.

    Returns:
        (pictures or squares, height, width, 3).
    """
    image = image[..., :3]
    count, height, width, _ = image.shape
    if fit == PAD and height != width:
        side = max(height, width)
        padded = torch.tensor(mean, dtype=image.dtype, device=image.device).expand(count, side, side, 3).clone()
        top, left = (side - height) // 2, (side - width) // 2
        padded[:, top : top + height, left : left + width] = image
        return padded
    _, found = cuts(height, width, fit, position)
    return torch.stack([image[:, t : t + h, x : x + w] for t, x, h, w in found], dim=1).flatten(0, 1)


def masked(image: torch.Tensor, mask: torch.Tensor, mean: list[float]) -> torch.Tensor:
    """The picture where the mask is white and the encoder's mean colour, which it sees as nothing, where it is black.

    Args:
        image: (pictures, height, width, channels). mask: (1 or pictures, height, width) or (height, width), 0 to 1,
            of any size.

    Raises:
        StyleLoomError: masks of another number, or that are not finite.
    """
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or not mask.numel() or len(mask) not in (1, len(image)):
        raise StyleLoomError(
            f"mask is {list(mask.shape)} for {len(image)} pictures",
            "one mask, or one for each picture",
            "Connect one mask, or as many as there are pictures.",
        )
    if not bool(mask.isfinite().all()):
        raise StyleLoomError("mask has values that are not finite", "0 to 1", "Look at the node that makes it.")
    image = image[..., :3]
    m = mask.to(image).clamp(0, 1)[:, None]
    if m.shape[2:] != image.shape[1:3]:
        m = F.interpolate(m, tuple(image.shape[1:3]), mode="bilinear", antialias=True).clamp(0, 1)
    m = m[:, 0, ..., None]
    nothing = torch.tensor(mean, dtype=image.dtype, device=image.device)
    return m * image + (1 - m) * nothing


def places(image: torch.Tensor, fit: str) -> torch.Tensor:
    """Where the squares lie on what they cover, as masks: (pictures or squares, height, width).

    Squares that lie over each other share the place: at every point the masks of a picture sum up to 1. Where the
    picture is one square the mask is white.
    """
    count, height, width = image.shape[:3]
    (top, left, full_h, full_w), found = cuts(height, width, fit if fit in (TILES, TILED) else PAD)
    if len(found) == 1:
        return torch.ones(count, 64, 64)
    scale = _PLACE / found[0][2]
    masks = torch.zeros(len(found), round(full_h * scale), round(full_w * scale))
    for mask, (t, x, h, w) in zip(masks, found):
        y0, y1 = (round((v - top) * scale) for v in (t, t + h))
        x0, x1 = (round((v - left) * scale) for v in (x, x + w))
        mask[y0:y1, x0:x1] = 1.0
    return (masks / masks.sum(0)).repeat(count, 1, 1)
