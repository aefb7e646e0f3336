"""What a LoRA file holds beside low-rank changes: full differences of weights, biases and norms (`.diff`, `.diff_b`,
`.w_norm`, `.b_norm`), and values that are set (`.set_weight`, `.reshape_weight`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch

from ..errors import StyleLoomError
from ..lora.low_rank import LowRank
from ..lora.reading import CanonicalLoRA
from .targets import name_of

Parts = dict[tuple[Hashable, str], torch.Tensor]
_SET = ("set_weight", "reshape_weight")
# Two spellings of one thing, of which a host applies only the last.
_TWINS = {"w_norm": "diff", "diff": "w_norm", "b_norm": "diff_b", "diff_b": "b_norm"}


def _conflict(target: Hashable, what: str) -> StyleLoomError:
    return StyleLoomError(
        f"{name_of(target)}: {what}",
        "at most one LoRA that sets a weight, and none that changes it too",
        "These LoRAs cannot be merged: load them one after the other.",
    )


def pass_other(
    loras: list[CanonicalLoRA],
    factors: list[float],
    notes: list[str],
    left_out: Callable[[int, Hashable], bool] = lambda index, target: False,
) -> Parts:
    """These parts of all LoRAs, each times its factor and added up, as loading the LoRAs one by one would.

    Args:
        factors: one a LoRA; 0 leaves it out.
        notes: a line for the report is added.
        left_out: whether the LoRA of that index is left out of that target.

    Raises:
        StyleLoomError: two LoRAs set one weight to different values.
    """
    found: Parts = {}
    for index, (lora, factor) in enumerate(zip(loras, factors)):
        for (target, part), tensor in lora.other.items():
            if factor == 0 or left_out(index, target):
                continue
            if part in _SET:
                if (target, part) in found and not torch.equal(found[target, part], tensor):
                    raise _conflict(target, f"two LoRAs set it ({part}) to different values")
                found[target, part] = tensor
                continue
            part = _TWINS[part] if (target, _TWINS[part]) in found else part
            own = tensor if factor == 1 else tensor.float() * factor
            sum_so_far = found.get((target, part))
            found[target, part] = own if sum_so_far is None else sum_so_far.float() + own.float()
    for target, part in list(found):
        if part == "b_norm" and (target, "w_norm") not in found:  # a host reads it beside a w_norm only
            found[target, "diff_b"] = found.pop((target, part))
    if found:
        notes.append(f"{len(found)} full differences of weights, biases and norms are added up as they are")
    return found


def fold_into_differences(adapters: dict[Hashable, LowRank], other: Parts, notes: list[str]) -> None:
    """Where a target has a low-rank change and a full difference, add the first to the second, in place and exactly.

    Both would be written under one name, and a host that reads the file keeps the difference alone.

    Raises:
        StyleLoomError: a target that has a low-rank change and is set to a value.
    """
    folded = 0
    for target, part in list(other):
        changed = target in adapters or any((target, name) in other for name in ("diff", "w_norm"))
        if part == "set_weight" and changed:
            raise _conflict(target, "one LoRA sets it to a value and another changes it")
        if part not in ("diff", "w_norm") or target not in adapters:
            continue
        if (target, "reshape_weight") in other:
            raise _conflict(target, "one LoRA changes its size and another holds a full difference for it")
        down, up = adapters.pop(target).factors()
        difference = other[target, part]
        other[target, part] = difference.float() + (up @ down).view(difference.shape)
        folded += 1
    if folded:
        notes.append(
            f"{folded} layers have a low-rank change in one LoRA and a full difference in another: both are written as "
            "one full difference"
        )
