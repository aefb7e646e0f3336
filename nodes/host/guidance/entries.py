"""What is connected as the LoRA of a branch: a LORA_MODEL or a stack of them."""

from __future__ import annotations

import dataclasses

from ....weights.errors import StyleLoomError
from ..pictures import checked_mask
from .schedule import BranchLoRA

Entries = tuple[BranchLoRA, ...]


def entries_of(
    lora, strength: float, start_percent: float, end_percent: float, name: str, mask=None, mask_name: str = "mask"
) -> Entries:
    """A LORA_MODEL or a stack, as the LoRAs of one branch: strengths and masks multiply, windows intersect.

    Raises:
        StyleLoomError: the window is empty, the input is neither, the mask is none.
    """
    masks = () if mask is None else (checked_mask(mask, mask_name),)
    if lora is None:
        return ()
    if start_percent >= end_percent:
        raise StyleLoomError(
            f"{name}: start_percent {start_percent:g} is not before end_percent {end_percent:g}",
            "a part of sampling, for example 0 to 0.6",
            "Swap the two, or set the strength to 0 to leave the LoRA out.",
        )
    if isinstance(lora, dict):
        lora = (BranchLoRA(lora, name=getattr(lora, "source", "")),)
    if not isinstance(lora, tuple) or not all(isinstance(entry, BranchLoRA) for entry in lora):
        raise StyleLoomError(
            f"{name} is a {type(lora).__name__}",
            "a LoRA",
            "Connect Image-to-LoRA Predictor, Load LoRA File, ComfyUI's LoRA Model output or LoRA Stack.",
        )
    return tuple(
        dataclasses.replace(
            entry,
            strength=entry.strength * strength,
            strength_clip=None if entry.strength_clip is None else entry.strength_clip * strength,
            start_percent=max(entry.start_percent, start_percent),
            end_percent=min(entry.end_percent, end_percent),
            masks=(*entry.masks, *masks),
        )
        for entry in lora
    )
