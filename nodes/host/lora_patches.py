"""Reading a LoRA into the host's patches for one model, without losing a key."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch

from ...weights.errors import StyleLoomError
from ...weights.lora.keys import group_keys, key_part, tensors_of
from ...weights.lora.kinds import BIAS_CHANGE, UnknownAdapter, from_host, kinds_of, to_host
from ...weights.row_adapters.layers import layer_of
from .missing_keys import ERROR, placed_keys, some, without_place
from .versions import host_versions


def _patched(key: str, target):
    """What the host patches for a LoRA key: the weight of the key map, or the bias beside it."""
    found = key_part(key)
    if found is not None and found[1] in BIAS_CHANGE.endings and isinstance(target, str):
        return target.removesuffix(".weight") + ".bias"
    return target


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


def _misplaced(roots: Iterable, target, adapter) -> str:
    """What is wrong with the place or the shape of a patch, or ''. The host only logs such a patch when it comes to it,
    and goes on without."""
    key, part = (target[0], target[1]) if isinstance(target, tuple) else (target, None)
    weight = weight_at(roots, key)
    if weight is None:
        return f"there is no {key} to patch"  # a bias of a layer without one, for example
    ((kind, own),) = kinds_of(from_host(adapter), key)
    layers = [
        layer for root in roots if (layer := layer_of(find_module(root, key.removesuffix(".weight")))) is not None
    ]
    # Quantised layers may store their weight in another shape than the one that they stand for.
    shape = list(layers[0].shape if key.endswith(".weight") and layers else weight.shape)
    if part is not None:
        shape[part[0]] = part[2]
    if own.get("reshape_weight") is not None:  # the host pads the weight with zeros first
        due = list(own["reshape_weight"])
        if part is not None or len(due) != len(shape) or any(new < old for new, old in zip(due, shape)):
            return f"{key} is {shape} and is to be enlarged to {due}"
        shape = due
    exact = kind.exact_shape(own)
    if exact is not None:
        return "" if exact == tuple(shape) else f"{key} is {shape} and its {kind.name} is {list(exact)}"
    forms = kind.shapes(own)
    rows, columns = shape[0], math.prod(shape[1:])
    if not forms or any(form[0] == rows and form[1] in (columns, None) for form in forms):
        return ""
    return f"{key} is {shape} and its patch makes {[size for size in forms[0] if size is not None]}"


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


def lora_patches(
    model, clip, lora, label: str = "LoRA", missing: str = ERROR, notes: list[str] | None = None
) -> dict:
    """The host's patches for a LoRA, each checked to have a place and the size of it.

    Args:
        model: MODEL.
        clip: CLIP or None.
        lora: LORA_MODEL in any format that the host reads, or in another spelling of its names.
        label: What errors call it.
        missing: `ERROR` or `WARN`: what becomes of keys that find no place. Keys of text encoders and alphas without
            anything that they scale are told in `notes` either way.
        notes: Takes what was left out, in lines.

    Returns:
        What `ModelPatcher.add_patches` takes: a weight's key, or (key, (axis, start, length)) for a part of a weight,
        to an adapter of the host's, or to a tuple such as ("diff", (change,)).

    Raises:
        StyleLoomError: keys that neither model nor clip knows, or not one that they know; a patch of the wrong size,
            halves of patches, several patches for one weight, of which the host would keep one; an adapter of the
            host's that is not known here.
    """
    name = type(model.model).__name__
    placed = placed_keys(comfy.lora_convert.convert_lora(dict(lora)), host_key_map(model, clip))
    lines = without_place(placed, name, clip is not None, lora, label, missing)
    if notes is not None:
        notes += lines
    converted, key_map = placed.found, placed.key_map
    _check_parts(converted, key_map, label)
    patches = comfy.lora.load_lora(converted, key_map)
    lost = sorted({stem for key, stem in placed.stems.items() if _patched(key, key_map[stem]) not in patches})
    if lost:
        raise StyleLoomError(
            f"{len(lost)} patches of the {label} are incomplete or of an unknown kind: {some(lost)}",
            "both halves of every patch",
            "The LoRA file is damaged, or of a format that this ComfyUI "
            "does not know: update ComfyUI, or export the LoRA again.",
        )
    roots = [model.model] + ([clip.cond_stage_model] if clip is not None else [])
    try:
        wrong = [problem for target, adapter in patches.items() if (problem := _misplaced(roots, target, adapter))]
    except UnknownAdapter as found:
        raise StyleLoomError(
            f"this ComfyUI reads a part of the {label} as {found} ({host_versions()})",
            "an adapter that StyleLoom knows",
            "Update StyleLoom, or apply this LoRA with ComfyUI's Load LoRA.",
        ) from found
    if wrong:
        raise StyleLoomError(
            f"{len(wrong)} patches of the {label} have another size than this {name} model: {wrong[0]}",
            "a LoRA for a model of this width",
            "Use the LoRA with the model that it was made for.",
        )
    return {target: workable(adapter) for target, adapter in patches.items()}


def workable(adapter):
    """The adapter in a form at which the host's merge does not stop."""
    parts = from_host(adapter)
    ((kind, own),) = kinds_of(parts, adapter[0] if isinstance(adapter, tuple) else adapter.name)
    made = kind.for_host(own)
    same = made.keys() == own.keys() and all(made[part] is own[part] for part in own)
    return adapter if same else to_host(adapter, made)


def passed_over(roots: Iterable[torch.nn.Module], patches: Mapping) -> set:
    """The targets of patches that the host takes and never merges.

    The host loads weights layer by layer, and passes over parameters that a module with layers inside it holds itself
    (a block's `modulation`, a model's tokens)."""
    passed = set()
    for target in patches:
        key = target[0] if isinstance(target, tuple) else target
        for root in roots:
            module = find_module(root, key.rpartition(".")[0])
            if module is not None and any("." in name for name, _ in module.named_parameters()):
                passed.add(target)
    return passed


def left_out(patches: Mapping) -> list[str]:
    """What the host's merge leaves out of patches, in words."""
    words = Counter(text for adapter in patches.values() if (text := _left_out(adapter)))
    return [f"ComfyUI's merge leaves out {text} ({count} x)" for text, count in words.items()]


def parameter_names(targets: Iterable) -> str:
    """The keys of some targets, for a report."""
    return some(sorted(str(target[0] if isinstance(target, tuple) else target) for target in targets))


def _left_out(adapter) -> str:
    ((kind, own),) = kinds_of(from_host(adapter), "")
    return kind.host_leaves_out(own)


def _check_parts(lora: Mapping[str, torch.Tensor], key_map: Mapping, label: str) -> None:
    """Raise StyleLoomError where the host's loader would stop with an error of its own (a missing half, an alpha of
    several numbers), or would keep one of several patches for one weight."""
    names, _ = group_keys(lora)
    broken, makers = [], {}
    for stem, keys in names.items():
        target = key_map.get(stem)
        if target is None or set(keys) == {"alpha"}:
            continue
        try:
            kinds = kinds_of(tensors_of(lora, keys), stem)
        except StyleLoomError as error:
            broken.append(error.found)
            continue
        for kind, own in kinds:
            for part in ("",) if kind.on_weight else own:
                makers.setdefault(_patched(f"{stem}.{part}", target), []).append(f"{stem} ({part or kind.name})")
            if kind is BIAS_CHANGE and isinstance(target, tuple):
                raise StyleLoomError(
                    f"the {label} changes a bias under {stem}, which is a part of {target[0]}, or has another order of "
                    "rows: ComfyUI has no place for it",
                    "changes of weights for such layers",
                    "Export the LoRA with the names of the layers in the checkpoint.",
                )
    if broken:
        raise StyleLoomError(
            f"{len(broken)} patches of the {label} are incomplete or damaged: {some(broken)}",
            "all parts of every patch",
            "The LoRA file is damaged: download it, or export it, again.",
        )
    several = [made for made in makers.values() if len(made) > 1]
    if several:
        raise StyleLoomError(
            f"{len(several)} weights are changed more than once by the {label}, and ComfyUI would keep one change of "
            f"each: {some(', '.join(made) for made in several)}",
            "one patch for each weight",
            "Give this LoRA to Merge LoRAs, which adds them up, or export it as two files.",
        )
