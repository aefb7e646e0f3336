"""Noise as a picture to move away from, after the kinds of noise of cubiq/ComfyUI_IPAdapter_plus.

Everything comes from one generator of its own on the CPU, so that the same seed gives the same picture everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import StyleLoomError

FADE, DISSOLVE, GAUSSIAN, SHUFFLE = "fade", "dissolve", "gaussian", "shuffle"
KINDS = (FADE, DISSOLVE, GAUSSIAN, SHUFFLE)
SIDE = 224  # what the encoders look at
_ALPHA, _SIGMA = 75.0, 3.5  # shuffle: how far pixels go (half of it, in pixels), and how smoothly at strength 0


def noise_picture(image: torch.Tensor | None, kind: str, strength: float, blur: int, seed: int) -> torch.Tensor:
    """A noisy picture.

    Args:
        image: (pictures, height, width, 3 or more) 0 to 1, of which the middle square is taken; None: a black one.
        kind: with x the picture, s the strength, u uniform and g normal random numbers:
            fade: (1 - s) x + s u. dissolve: each number is u with probability s, else x. gaussian: x + s g.
            shuffle: the pixels of x moved about, smoothly where s is small, turned upside down and left to right; then
            x (1 - n) + n with n = 0.75 s g.
        blur: side of the Gaussian that is laid over it, made odd; 0: none.

    Returns:
        (pictures, 224, 224, 3) fp32, 0 to 1.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros(1, 3, SIDE, SIDE) if image is None else _middle(image)
    if kind == FADE:
        made = (1 - strength) * x + strength * torch.rand(x.shape, generator=g)
    elif kind == DISSOLVE:
        chosen = torch.rand(x.shape, generator=g) < strength
        made = torch.where(chosen, torch.rand(x.shape, generator=g), x)
    elif kind == GAUSSIAN:
        made = x + strength * torch.randn(x.shape, generator=g)
    elif kind == SHUFFLE:
        x = _moved(x, (1 - strength) * _SIGMA, g).flip(2, 3)
        n = 0.75 * strength * torch.randn(x.shape, generator=g)
        made = x * (1 - n) + n
    else:
        raise StyleLoomError(f"kind is {kind!r}", f"one of {', '.join(KINDS)}", "Choose one of the list.")
    made = made.clamp(0, 1)
    if blur > 0:
        side = blur | 1
        made = gaussian_blur(made, side, 0.3 * ((side - 1) * 0.5 - 1) + 0.8)
    return made.movedim(1, -1).contiguous()


def _middle(image: torch.Tensor) -> torch.Tensor:
    x = image[..., :3].float().cpu().movedim(-1, 1)
    height, width = x.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    x = x[:, :, top : top + side, left : left + side]
    if side != SIDE:
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
    return x.clamp(0, 1)


def _moved(x: torch.Tensor, sigma: float, g: torch.Generator) -> torch.Tensor:
    """Each pixel is taken from a place nearby: uniform steps, smoothed by a Gaussian of `sigma`; black from outside."""
    steps = torch.rand(1, 2, *x.shape[2:], generator=g) * 2 - 1
    if sigma > 0:
        steps = gaussian_blur(steps, int(8 * sigma + 1) | 1, sigma)
    place = F.affine_grid(torch.eye(2, 3)[None], [1, 1, *x.shape[2:]], align_corners=False)
    place = place + steps.movedim(1, -1) * (_ALPHA / SIDE)
    return F.grid_sample(x, place.expand(len(x), -1, -1, -1), mode="bilinear", align_corners=False)


def gaussian_blur(x: torch.Tensor, side: int, sigma: float) -> torch.Tensor:
    """(n, channels, height, width) under a Gaussian of an odd side, the borders mirrored."""
    at = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, side)
    half = side // 2
    x = F.pad(x, (half, half, half, half), mode="reflect")
    x = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.movedim(2, 3), groups=x.shape[1])
