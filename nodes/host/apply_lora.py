"""Patching a model with a LoRA through the host's own loaders, without losing a key."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import comfy.float
import comfy.lora
import comfy.utils
import torch

from ...weights.errors import StyleLoomError
from .lora_patches import left_out, lora_patches, parameter_names, passed_over
from .missing_keys import ERROR, some
from .row_terms import parts_of

_OF_A_LORA = "styleloom_of_a_lora"  # on a parameter that stands in the place of a model's own


def exchanged(model) -> list[str]:
    """The parameters of a MODEL that Apply LoRA has exchanged whole, the LoRA in them."""
    return [key for key, value in model.object_patches.items() if getattr(value, _OF_A_LORA, False)]


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
    missed: list[str] = []
    patches = lora_patches(model, clip, lora, missing=missing, notes=missed)
    for line in missed:
        logging.warning("StyleLoom: Apply LoRA: %s", line)
    notes = missed + left_out(patches)
    name = type(model.model).__name__
    lines = []
    patched, patched_clip = model, clip
    if strength != 0:
        patched = model.clone()
        done, whole = _add(patched, patched.model, patches, strength)
        lines.append(f"{len(done)} of {len(patches)} patches on {name} at strength {strength:g}")
        if whole:
            lines.append(
                f"{len(whole)} of them on parameters that ComfyUI's own merge passes over, which this node sets "
                f"itself: {parameter_names(whole)}"
            )
    else:
        done = set()
        lines.append(f"strength 0: {name} is left as it is")
    if clip is not None:
        patched_clip, done_clip = clip, set()
        if strength_clip != 0:
            patched_clip = clip.clone()
            done_clip, _ = _add(patched_clip.patcher, clip.cond_stage_model, patches, strength_clip)
        lines.append(f"{len(done_clip)} patches on the text encoder at strength {strength_clip:g}")
        done |= done_clip
    missed = [target for target in patches if target not in done]
    if missed and strength != 0 and (clip is None or strength_clip != 0):
        raise StyleLoomError(
            f"{len(missed)} patches were not taken: {some(map(str, missed))}",
            f"a LoRA for {name}",
            "Use the LoRA with the model that it was made for.",
        )
    return patched, patched_clip, "\n".join(lines + notes)


def _add(patcher, root: torch.nn.Module, patches: Mapping, strength: float) -> tuple[set, set]:
    """(the patches that were taken, those among them whose parameter is exchanged)."""
    whole = passed_over([root], patches)
    merged = {target: patch for target, patch in patches.items() if target not in whole}
    done = set(patcher.add_patches(merged, strength))
    for target in whole:
        key, part, swap = parts_of(target)
        before = patcher.get_model_object(key)
        change = [(strength, patches[target], 1.0, part, swap)]
        made = comfy.lora.calculate_weight(change, before.detach().to(torch.float32, copy=True), key)
        made = comfy.float.stochastic_rounding(made, before.dtype, seed=comfy.utils.string_to_seed(key))
        made = torch.nn.Parameter(made, requires_grad=False)
        setattr(made, _OF_A_LORA, True)
        patcher.add_object_patch(key, made)
    return done | whole, whole
