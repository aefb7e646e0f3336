"""LoRAs that a model is patched with already, taken off it and made LoRAs of one side."""

from __future__ import annotations

import uuid

import comfy.weight_adapter

from ....weights.errors import StyleLoomError
from ....weights.lora.kinds import DORA, SET_WEIGHT, UnknownAdapter, from_host, kinds_of
from ..apply_lora import exchanged
from ..missing_keys import some
from .entries import Entries
from .schedule import BranchLoRA

_BYPASS = "bypass_lora"  # under which the host puts a LoRA that it computes beside the layers


def lifted(model) -> tuple[object, Entries]:
    """(a clone of a MODEL without the LoRAs that it is patched with, these LoRAs).

    What counts as a LoRA is a patch that adds to a weight, whoever put it there: ComfyUI's Load LoRA, Apply LoRA, or
    others. Merged checkpoints stay: they are the model.

    Raises:
        StyleLoomError: a LoRA that is beside the weights (Load LoRA, Bypass), or in a parameter that Apply LoRA has
            exchanged; a merge on top of a LoRA; a DoRA on top of, or under, another LoRA.
    """
    if _BYPASS in model.injections:
        raise StyleLoomError(
            "the model has a LoRA from a Bypass loader, which acts on both sides",
            "LoRAs that the model is patched with, or LoRAs in positive_lora",
            "Load it with ComfyUI's Load LoRA or with Apply LoRA, or connect it to positive_lora.",
        )
    whole = exchanged(model)
    if whole:
        raise StyleLoomError(
            f"the model has a LoRA from Apply LoRA on parameters that were exchanged whole: {some(sorted(whole))}",
            "LoRAs that can be taken off the negative side again",
            "Connect this LoRA to positive_lora instead, and leave Apply LoRA out.",
        )
    bare = model.clone()
    loras: dict[tuple[float, int], dict] = {}
    for key, patches in model.patches.items():
        mine = [_is_lora(value) and strength_model == 1.0 for _, value, strength_model, _, _ in patches]
        if not any(mine):
            continue
        _check_order(key, patches, mine)
        seen: dict[tuple, int] = {}
        for (strength, value, _, offset, function), lora in zip(patches, mine, strict=True):
            if not lora:
                continue
            target = key if offset is None and function is None else (key, offset, function)
            if function is None and offset is not None:
                target = (key, offset)
            again = seen[target, strength] = seen.get((target, strength), -1) + 1
            loras.setdefault((strength, again), {})[target] = value
        bare.patches[key] = [patch for patch, lora in zip(patches, mine, strict=True) if not lora]
        if not bare.patches[key]:
            del bare.patches[key]
    bare.patches_uuid = uuid.uuid4()
    entries = tuple(
        BranchLoRA({}, strength, patches=patches, name="of the model") for (strength, _), patches in loras.items()
    )
    return bare, entries


def _is_lora(value) -> bool:
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return True
    return isinstance(value, tuple) and len(value) == 2 and value[0] in ("diff", "set")


def _check_order(key: str, patches, mine: list[bool]) -> None:
    first = mine.index(True)
    if not all(mine[first:]):
        raise StyleLoomError(
            f"the model was merged with another one after a LoRA was put on it ({key})",
            "a merge first and LoRAs after it",
            "Put the LoRA on the merged model, or connect it to positive_lora.",
        )
    if sum(mine) > 1 and any(_reads_the_weight(value) for (_, value, *_), lora in zip(patches, mine) if lora):
        raise StyleLoomError(
            f"the model has several LoRAs on {key}, one of which depends on what the others made of it",
            "one LoRA for a layer that has a DoRA",
            "Connect the LoRAs to positive_lora through LoRA Stack.",
        )


def _reads_the_weight(value) -> bool:
    try:
        return any(kind in (DORA, SET_WEIGHT) for kind, _ in kinds_of(from_host(value), ""))
    except UnknownAdapter:
        return True
