"""IMAGE and MASK, the host's: made of a drawing, and looked at before they are used."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ...weights.errors import StyleLoomError


def to_image(picture: Image.Image) -> torch.Tensor:
    """PIL RGB → IMAGE (1, H, W, 3), float32 in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255.0)[None]


def checked_mask(mask: torch.Tensor, name: str = "mask") -> torch.Tensor:
    """A MASK as (pictures, height, width), float32 on the CPU.

    Raises:
        StyleLoomError: another shape, values that are not finite.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or not mask.numel():
        raise StyleLoomError(
            f"{name} is {list(mask.shape)}", "(pictures, height, width)", f"Connect a mask to {name}, or nothing."
        )
    if not bool(mask.isfinite().all()):
        raise StyleLoomError(f"{name} has values that are not finite", "0 to 1", "Look at the node that makes it.")
    return mask.float().cpu()
