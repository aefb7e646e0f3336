"""What a target is: the weight of a model that a LoRA changes, or a part of it.

A host names a target by the weight's key, or by a tuple (key, slice) or (key, slice, function). The slice is (axis,
start, length), or None for the whole weight; the function reorders the rows of the change (the two halves of
`norm_out.linear` of diffusers stand the other way round in the checkpoint).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch

from ..errors import StyleLoomError
from ..lora.reading import CanonicalLoRA

Slice = tuple[int, int, int]


def key_of(target: Hashable) -> str:
    """The key of the weight."""
    return str(target[0] if isinstance(target, tuple) else target)


def slice_of(target: Hashable) -> Slice | None:
    """(axis, start, length) of the part of the weight; None for the whole."""
    return target[1] if isinstance(target, tuple) else None


def name_of(target: Hashable) -> str:
    """For reports: the key, and the slice behind it where there is one."""
    part = slice_of(target)
    return key_of(target) if part is None else f"{key_of(target)}[{part[0]}:{part[1]}+{part[2]}]"


def plain_targets(lora: CanonicalLoRA) -> None:
    """Carry out the functions of targets on the changes themselves, in place: f(up @ down) = f(up) @ down for a
    function that reorders rows. Then one weight has one target, whatever names its LoRA has.

    Raises:
        StyleLoomError: a function that does more than reorder rows; two adapters for one weight.
    """
    for target in [t for t in lora.stems if isinstance(t, tuple) and len(t) > 2]:
        plain = target[0] if target[1] is None else target[:2]
        if plain in lora.stems:
            raise StyleLoomError(
                f"{lora.label}: {lora.stems[target]} and {lora.stems[plain]} are for the same weight",
                "one adapter for each layer",
                "The file holds several adapters: save one of them alone.",
            )
        lora.stems[plain] = lora.stems.pop(target)
        if target in lora.adapters:
            adapter = lora.adapters.pop(target)
            lora.adapters[plain] = replace(adapter, up=_reordered(target, adapter.up, lora.label))
        for part in [part for t, part in lora.other if t == target]:
            tensor = lora.other.pop((target, part))
            sizes = part == "reshape_weight"  # it holds sizes, not rows
            lora.other[plain, part] = tensor if sizes else _reordered(target, tensor, lora.label)


def _reordered(target: tuple, tensor: torch.Tensor, label: str) -> torch.Tensor:
    """The rows of a tensor in the order that the target's function gives them."""
    probe = torch.arange(len(tensor), dtype=torch.float64)[:, None].repeat(1, 2)
    found = target[2](probe)
    same_rows = found.shape == probe.shape and torch.equal(found.sort(0).values, probe)
    if not same_rows or not torch.equal(found[:, 0], found[:, 1]):
        raise StyleLoomError(
            f"{label}: {name_of(target)} is stored in a form that this pack does not know",
            "a LoRA whose names ComfyUI maps to whole weights, slices of them, or reordered rows",
            "Load this LoRA beside the merged one.",
        )
    order = found[:, 0].long()
    if tensor.element_size() == 1:  # 8-bit floats cannot be indexed
        return tensor.view(torch.uint8)[order].view(tensor.dtype)
    return tensor[order]
