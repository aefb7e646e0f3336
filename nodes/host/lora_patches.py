"""Reading a LoRA into the host's patches for one model, without losing a key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch

from ...weights.row_adapters.layers import layer_of
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


def _made(adapter) -> list[tuple[int, int | None]]:
    """(rows, columns) of the change that a patch makes, convolutions flattened: the forms that it can be read in, or
    none where the kind does not fix it. None for columns: any number."""
    if isinstance(adapter, tuple):  # ("diff", (change, …))
        change = adapter[1][0]
        return [(change.shape[0], change[0].numel())] if adapter[0] == "diff" and change.ndim else []
    weights, kind = adapter.weights, adapter.name
    if kind == "lora" and weights[5] is None:  # up, down, alpha, mid, dora_scale, reshape
        up, down, mid = weights[0], weights[1], weights[3]
        return [(up.shape[0], down[0].numel() * (1 if mid is None else mid[0, 0].numel()))]
    if kind == "loha":  # w1a, w1b, alpha, w2a, w2b, t1, t2, dora_scale
        w1a, w1b, core = weights[0], weights[1], weights[5]
        return [(w1a.shape[0], w1b.shape[1]) if core is None else (w1a.shape[1], w1b.shape[1] * core[0, 0].numel())]
    if kind == "lokr":  # w1, w2, alpha, w1a, w1b, w2a, w2b, t2, dora_scale
        w1, w2, _, w1a, w1b, w2a, w2b, core = weights[:8]
        shape1 = (w1a.shape[0], w1b.shape[1]) if w1 is None else w1.shape
        if w2 is not None:
            shape2 = (w2.shape[0], w2[0].numel())
        elif core is not None:
            shape2 = (w2a.shape[1], w2b.shape[1] * core[0, 0].numel())
        else:
            shape2 = (w2a.shape[0], w2b[0].numel())
        return [(shape1[0] * shape2[0], shape1[1] * shape2[1])]
    if kind in ("oft", "boft"):  # blocks (…, number, size, size)
        return [(weights[0].shape[-3] * weights[0].shape[-1], None)]
    if kind == "glora":  # a1, a2, b1, b2: the change is b1 b2, or b2 b1 in the first form
        b1, b2 = weights[2], weights[3]
        return [(b1.shape[0], b2[0].numel()), (b2.shape[0], b1[0].numel())]
    return []


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
    forms = _made(adapter)
    if not forms:
        return ""
    layers = [
        layer for root in roots if (layer := layer_of(find_module(root, key.removesuffix(".weight")))) is not None
    ]
    # Quantised layers may store their weight in another shape than the one that they stand for.
    shape = list(layers[0].shape if key.endswith(".weight") and layers else weight.shape)
    if part is not None:
        shape[part[0]] = part[2]
    rows, columns = shape[0], math.prod(shape[1:])
    if any(form[0] == rows and form[1] in (columns, None) for form in forms):
        return ""
    return f"{key} is {shape} and its patch makes {[size for size in forms[0] if size is not None]}"


# Beginnings of the keys that trainers write for text encoders.
_TEXT = (
    "lora_te",
    "text_encoder",
    "text_model",
    "te.",
    "te1.",
    "te2.",
    "lora_prior_te",
    "clip_l.",
    "clip_g.",
    "t5xxl.",
)


def is_text_key(key: str) -> bool:
    """A LoRA's key is for a text encoder, by its name."""
    return key.startswith(_TEXT)


def find_module(root: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The module of that name below `root`, or None."""
    try:
        return comfy.utils.get_attr(root, name)
    except AttributeError:
        return None


def host_key_map(model, clip) -> dict:
    """Every name that the host knows for a weight of a MODEL, and of a CLIP if there is one → its target."""
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    return key_map if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)


def lora_patches(model, clip, lora, label: str = "LoRA") -> dict:
    """The host's patches for a LoRA, each checked to have a place and the size of it.

    Args:
        model: MODEL.
        clip: CLIP or None.
        lora: LORA_MODEL in any format that the host reads.
        label: What errors call it.

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
        text = [key for key in unknown if is_text_key(key)]
        raise StyleLoomError(
            f"{len(unknown)} of the {label}'s {len(converted)} keys find no place in this {name} model: "
            f"{some(unknown)}",
            f"a LoRA for {name}" + ("" if clip is not None or not text else ", with the text encoder in clip"),
            "Use the LoRA with the model that it was made for."
            if clip is not None or len(text) < len(unknown)
            else "Connect clip: these keys are for the text encoder.",
        )
    patches = comfy.lora.load_lora(converted, key_map)
    lost = sorted({stem for key, stem in stems.items() if _patched(key, key_map[stem]) not in patches})
    if lost:
        raise StyleLoomError(
            f"{len(lost)} patches of the {label} are incomplete or of an unknown kind: {some(lost)}",
            "both halves of every patch",
            "The LoRA file is damaged, or of a format that this ComfyUI "
            "does not know: update ComfyUI, or export the LoRA again.",
        )
    roots = [model.model] + ([clip.cond_stage_model] if clip is not None else [])
    wrong = [problem for target, adapter in patches.items() if (problem := _check_shape(roots, target, adapter))]
    if wrong:
        raise StyleLoomError(
            f"{len(wrong)} patches of the {label} have another size than this {name} model: {wrong[0]}",
            "a LoRA for a model of this width",
            "Use the LoRA with the model that it was made for.",
        )
    return patches
