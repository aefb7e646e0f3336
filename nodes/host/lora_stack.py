"""LoRAs of other nodes as entries of a LoRA Stack, and entries of a LoRA Stack for other nodes.

LORA_STACK, as many packs have it, is a list of (file in models/loras, strength on the model, strength on the text
encoder). HOOKS are ComfyUI's own.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import comfy.hooks

from ...weights.errors import StyleLoomError
from . import folders
from .guidance.entries import Entries
from .guidance.schedule import BranchLoRA
from .lora_file import load_lora_file

# What a (file, strength, strength) can say of an entry; anything else has to be as it is by default.
_SAID = ("lora", "strength", "strength_clip", "name")
_TOO_MUCH = {
    "start_percent": "a start_percent",
    "end_percent": "an end_percent",
    "keyframes": "keyframes",
    "masks": "a mask",
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(BranchLoRA) if field.name not in _SAID}


def from_tuples(stack: Any) -> Entries:
    """The files of a LORA_STACK, read. None, and entries called None, are left out, as other packs do.

    Raises:
        StyleLoomError: something else than a list of (name, strength, strength); a file that is not listed.
    """
    if stack is None:
        return ()
    if not isinstance(stack, (list, tuple)):
        raise _no_stack(f"lora_stack is a {type(stack).__name__}")
    made = []
    for number, entry in enumerate(stack, 1):
        if not isinstance(entry, (list, tuple)) or len(entry) < 3 or not isinstance(entry[0], str | None):
            raise _no_stack(f"entry {number} of lora_stack is {_shown(entry)}")
        name, *strengths = entry[:3]
        if not all(_is_number(strength) for strength in strengths):
            raise _no_stack(f"entry {number} of lora_stack ({name}) has the strengths {_shown(strengths)}")
        if name in (None, "", "None"):
            continue
        lora = load_lora_file(_listed_as(name))
        made.append(BranchLoRA(lora, float(strengths[0]), name=lora.source, strength_clip=float(strengths[1])))
    return tuple(made)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _listed_as(name: str) -> str:
    """As our lists spell it: other packs have the separators of the system."""
    return name.replace(os.sep, "/")


def _no_stack(found: str) -> StyleLoomError:
    return StyleLoomError(
        found,
        "a list of (file name, strength, strength on the text encoder)",
        "Connect the lora_stack output of a LoRA stacker node.",
    )


def from_hooks(hooks: comfy.hooks.HookGroup | None) -> Entries:
    """The LoRAs of Create Hook LoRA in a hook group, each with its strengths and keyframes.

    Raises:
        StyleLoomError: a hook of another kind.
    """
    made = []
    for hook in hooks.hooks if hooks is not None else ():
        lora = isinstance(hook, comfy.hooks.WeightHook) and hook.need_weight_init and isinstance(hook.weights, dict)
        if not lora:
            kind = hook.hook_type.value if hook.hook_type is not None else type(hook).__name__
            what = "weights of a model (Create Hook Model as LoRA)" if kind == "weight" else f"the kind {kind}"
            raise StyleLoomError(
                f"hooks has a hook of {what}",
                "hooks from Create Hook LoRA",
                "Leave this hook out here, and set it on the conditioning with Cond Set Props.",
            )
        bare = hook.clone()
        bare.hook_keyframe = comfy.hooks.HookKeyframeGroup()
        frames = None if hook.hook_keyframe.is_empty() else hook.hook_keyframe
        made.append(
            BranchLoRA(
                hook.weights,
                bare.strength_model,
                keyframes=frames,
                name=getattr(hook.weights, "source", "") or "a hook",
                strength_clip=bare.strength_clip,
            )
        )
    return tuple(made)


def _same(value: Any, default: Any) -> bool:
    return value is default if default is None else value == default


def to_tuples(entries: Entries) -> tuple[list[tuple[str, float, float]] | None, str]:
    """(LORA_STACK, ''), or (None, why these LoRAs cannot be said as one)."""
    made = []
    listed = set(folders.listed(folders.LORAS))
    for number, entry in enumerate(entries, 1):
        name = getattr(entry.lora, "source", "")
        if name not in listed:
            return None, (
                f"LoRA {number} is no file in models/loras as it is: it was predicted, merged, filtered, or is in a "
                "hook. Save it with Save LoRA File and load the file with Load LoRA File"
            )
        if getattr(entry.lora, "renamed", False):
            return None, (
                f"LoRA {number} ({name}) has names of layers that ComfyUI's own loader does not know, so that other "
                "nodes would lose them. Save it with Save LoRA File and load that file with Load LoRA File"
            )
        more = [field for field, default in _DEFAULTS.items() if not _same(getattr(entry, field), default)]
        if more:
            return None, (
                f"LoRA {number} ({name}) has {_TOO_MUCH.get(more[0], more[0])}, and a LORA_STACK has strengths only"
            )
        clip = entry.strength if entry.strength_clip is None else entry.strength_clip
        made.append((name.replace("/", os.sep), entry.strength, clip))
    return made, ""
