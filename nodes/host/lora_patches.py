"""Reading a LoRA into the host's patches for one model, without losing a key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import comfy.lora
import comfy.lora_convert
import comfy.utils

from ...weights.errors import StyleLoomError


def _stem(key: str, key_map: Mapping) -> str | None:
    """The name in the host's key map that a LoRA key belongs to: a dotted beginning of it."""
    at = key.find(".")
    while at != -1:
        if key[:at] in key_map:
            return key[:at]
        at = key.find(".", at + 1)
    return None


def _patched(key: str, target):
    """What the host patches for a LoRA key: the weight of the key map, or the bias beside it."""
    if key.endswith((".diff_b", ".b_norm")) and isinstance(target, str):
        return target.removesuffix(".weight") + ".bias"
    return target


def some(keys: Iterable[str]) -> str:
    """The first three, and how many more."""
    keys = list(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _made(adapter) -> tuple[int, int] | None:
    """(rows, columns) of the change that a patch makes, convolutions flattened; None where the kind does not fix it."""
    if isinstance(adapter, tuple):  # ("diff", (change, …))
        change = adapter[1][0]
        return (change.shape[0], change[0].numel()) if adapter[0] == "diff" and change.ndim else None
    weights, kind = adapter.weights, adapter.name
    if kind == "lora" and weights[5] is None:  # up, down, alpha, mid, dora_scale, reshape
        up, down, mid = weights[0], weights[1], weights[3]
        return (up.shape[0], down[0].numel() * (1 if mid is None else mid[0, 0].numel()))
    if kind == "loha" and weights[5] is None:  # w1a, w1b, alpha, w2a, w2b, t1, t2, dora_scale
        return (weights[0].shape[0], weights[1].shape[1])
    if kind == "lokr" and weights[7] is None:  # w1, w2, alpha, w1a, w1b, w2a, w2b, t2, dora_scale
        w1, w2, _, w1a, w1b, w2a, w2b = weights[:7]
        shape1 = (w1a.shape[0], w1b.shape[1]) if w1 is None else w1.shape
        shape2 = (w2a.shape[0], w2b[0].numel()) if w2 is None else (w2.shape[0], w2[0].numel())
        return (shape1[0] * shape2[0], shape1[1] * shape2[1])
    return None


def weight_at(roots: Iterable, key: str):
    """The parameter of that name in the first module that has it, else None. Its shape is the logical one also where a
    quantised layer would write another into its state dict."""
    for root in roots:
        try:
            found = comfy.utils.get_attr(root, key)
        except AttributeError:
            continue
        if found is not None:
            return found
    return None


def _check_shape(roots: Iterable, target, adapter) -> str:
    """What is wrong with the place or the shape of a patch, or ''. The host only logs such a patch when it comes to it,
    and goes on without."""
    key, part = (target[0], target[1]) if isinstance(target, tuple) else (target, None)
    weight = weight_at(roots, key)
    if weight is None:
        return f"there is no {key} to patch"  # a bias of a layer without one, for example
    made = _made(adapter)
    if made is None:
        return ""
    shape = list(weight.shape)
    if part is not None:
        shape[part[0]] = part[2]
    due = (shape[0], math.prod(shape[1:]))
    return "" if made == due else f"{key} is {shape} and its patch makes {list(made)}"


def host_key_map(model, clip) -> dict:
    """Every name that the host knows for a weight of a MODEL, and of a CLIP if there is one → its target."""
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    return key_map if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)


def lora_patches(model, clip, lora) -> dict:
    """The host's patches for a LoRA, each checked to have a place and the size of it.

    Args:
        model: MODEL.
        clip: CLIP or None.
        lora: LORA_MODEL in any format that the host reads.

    Returns:
        What `ModelPatcher.add_patches` takes: a weight's key, or (key, (axis, start, length)) for a part of a weight,
        to an adapter of the host's, or to a tuple such as ("diff", (change,)).

    Raises:
        StyleLoomError: keys that neither model nor clip knows, a patch of the wrong size, halves of patches.
    """
    key_map = host_key_map(model, clip)
    converted = comfy.lora_convert.convert_lora(dict(lora))
    stems = {key: _stem(key, key_map) for key in converted}
    unknown = [key for key, stem in stems.items() if stem is None]
    name = type(model.model).__name__
    if unknown:
        text = [key for key in unknown if key.startswith(("lora_te", "text_encoder", "text_model", "te."))]
        raise StyleLoomError(
            f"{len(unknown)} of the LoRA's {len(converted)} keys find no place in this {name} model: {some(unknown)}",
            f"a LoRA for {name}" + ("" if clip is not None or not text else ", with the text encoder in clip"),
            "Use the LoRA with the model that it was made for."
            if clip is not None or len(text) < len(unknown)
            else "Connect clip: these keys are for the text encoder.",
        )
    patches = comfy.lora.load_lora(converted, key_map)
    lost = sorted({stem for key, stem in stems.items() if _patched(key, key_map[stem]) not in patches})
    if lost:
        raise StyleLoomError(
            f"{len(lost)} patches are incomplete or of an unknown kind: {some(lost)}",
            "both halves of every patch",
            "The LoRA file is damaged, or of a format that this ComfyUI "
            "does not know: update ComfyUI, or export the LoRA again.",
        )
    roots = [model.model] + ([clip.cond_stage_model] if clip is not None else [])
    wrong = [problem for target, adapter in patches.items() if (problem := _check_shape(roots, target, adapter))]
    if wrong:
        raise StyleLoomError(
            f"{len(wrong)} patches have another size than this {name} model: {wrong[0]}",
            "a LoRA for a model of this width",
            "Use the LoRA with the model that it was made for.",
        )
    return patches
