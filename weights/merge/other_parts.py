"""What a LoRA file holds beside low-rank changes: full differences of weights, biases and norms (`.diff`, `.diff_b`,
`.w_norm`, `.b_norm`), and values that are set (`.set_weight`, `.reshape_weight`)."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable

import torch

from ..errors import StyleLoomError
from ..lora.reading import CanonicalLoRA
from .targets import name_of

Parts = dict[tuple[Hashable, str], torch.Tensor]
_SET = ("set_weight", "reshape_weight")


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
                    raise StyleLoomError(
                        f"two LoRAs set {name_of(target)} ({part}) to different values",
                        "at most one that does",
                        "These LoRAs cannot be merged: load them one after the other.",
                    )
                found[target, part] = tensor
                continue
            own = tensor if factor == 1 else tensor.float() * factor
            sum_so_far = found.get((target, part))
            found[target, part] = own if sum_so_far is None else sum_so_far.float() + own.float()
    if found:
        notes.append(f"{len(found)} full differences of weights, biases and norms are added up as they are")
    return found


def folded_line(adapters: Container[Hashable], other: Parts) -> list[str]:
    """For the report: layers with a low-rank change and a full difference, which the writer makes one."""
    both = {target for target, part in other if part in ("diff", "w_norm") and target in adapters}
    if not both:
        return []
    return [
        f"{len(both)} layers have a low-rank change in one LoRA and a full difference in another: each is written as "
        "one full difference, which is exact and makes a larger file"
    ]
