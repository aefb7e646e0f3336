"""Patching a model with a LoRA through the host's own loaders, without losing a key."""

from __future__ import annotations

import logging

from ...weights.errors import StyleLoomError
from .lora_patches import lora_patches, not_merged
from .missing_keys import ERROR, some


def apply_lora(model, clip, lora, strength: float, strength_clip: float, missing: str = ERROR):
    """Clone and patch.

    Args:
        model: MODEL.
        clip: CLIP or None.
        lora: LORA_MODEL in any format that the host reads.
        missing: What becomes of keys that find no place: `ERROR` or `WARN`.

    Returns:
        (MODEL, CLIP or None, report). With strength 0 the object given comes back.

    Raises:
        StyleLoomError: as `lora_patches`.
    """
    left_out: list[str] = []
    patches = lora_patches(model, clip, lora, missing=missing, notes=left_out)
    for line in left_out:
        logging.warning("StyleLoom: Apply LoRA: %s", line)
    roots = [model.model] + ([clip.cond_stage_model] if clip is not None else [])
    idle, notes = not_merged(roots, patches)
    name = type(model.model).__name__
    lines = []
    patched, patched_clip = model, clip
    if strength != 0:
        patched = model.clone()
        done = set(patched.add_patches(patches, strength))
        lines.append(f"{len(done - idle)} of {len(patches)} patches on {name} at strength {strength:g}")
    else:
        done = set()
        lines.append(f"strength 0: {name} is left as it is")
    if clip is not None:
        patched_clip = clip.clone() if strength_clip != 0 else clip
        done_clip = set(patched_clip.add_patches(patches, strength_clip)) if strength_clip != 0 else set()
        lines.append(f"{len(done_clip)} patches on the text encoder at strength {strength_clip:g}")
        done |= done_clip
    missed = [target for target in patches if target not in done]
    if missed and strength != 0 and (clip is None or strength_clip != 0):
        raise StyleLoomError(
            f"{len(missed)} patches were not taken: {some(map(str, missed))}",
            f"a LoRA for {name}",
            "Use the LoRA with the model that it was made for.",
        )
    return patched, patched_clip, "\n".join(lines + left_out + notes)
