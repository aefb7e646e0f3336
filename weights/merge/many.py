"""Merging any number of whole LoRAs by one of the methods."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from ..errors import StyleLoomError
from ..lora.adapters import LowRank
from ..lora.algebra import thin_svd
from ..lora.reading import CanonicalLoRA
from ..parallel import map_single_threaded
from .layers import LayerReport, MergedLayers, all_targets
from .measure import cut, own_input
from .methods import METHODS, Options


def merge_many(
    loras: list[CanonicalLoRA],
    strengths: list[float],
    method: str,
    options: Options,
    max_rank: int = 0,
    energy: float = 1.0,
    on_step: Callable[[], None] = lambda: None,
) -> MergedLayers:
    """Merge layer by layer. A layer that only one LoRA has passes through at full strength (with `average` too: there
    is nothing to weigh it against).

    Args:
        options: as for the methods; `rank` and `target` are set here.
        max_rank: 0 for no limit. TIES and DARE, whose results have full rank, then keep the sum of the ranks.
        energy: share of each layer's ‖ΔW‖² to keep, 1 for all.

    Raises:
        StyleLoomError: an unknown method, fewer than two LoRAs.
    """
    if method not in METHODS:
        raise StyleLoomError(f"method is {method!r}", f"one of {', '.join(METHODS)}", "Choose one of these.")
    if len(loras) < 2:
        raise StyleLoomError(f"{len(loras)} LoRA to merge", "two or more", "Connect a second LoRA.")
    targets = all_targets(loras)
    result = MergedLayers()

    def one(target: Hashable):
        return _merge_one(target, loras, strengths, method, options, max_rank, energy)

    with map_single_threaded(one, targets, at_once=1 if method in ("TIES", "DARE") else 8) as done:
        for target, (adapter, report) in zip(targets, done):
            on_step()
            if adapter is not None:
                result.adapters[target], result.reports[target] = adapter, report
    return result


def _merge_one(target, loras, strengths, method, options, max_rank, energy):
    found = [lora.adapters.get(target) for lora in loras]
    changes = [
        None if adapter is None or strength == 0 else thin_svd(adapter.down, adapter.up * strength)
        for adapter, strength in zip(found, strengths)
    ]
    changes = [change if change is not None and change.values.numel() else None for change in changes]
    there = [change for change in changes if change is not None]
    kernel = next(adapter.kernel for adapter in found if adapter is not None)
    if not there:
        return None, None
    if len(there) == 1:
        pair, kept = cut(there[0].pair(), max_rank, energy)
        report = LayerReport(pair.rank, tuple(None if c is None else 1.0 for c in changes), energy=kept)
        return LowRank(*pair, kernel), report
    ranks = sum(change.values.numel() for change in there)
    options = replace(options, rank=max_rank or ranks, target=str(target))
    made = METHODS[method](there, options)
    pair, kept = cut(made, max_rank, energy)
    on_own = [None if change is None else own_input(pair, change) for change in changes]
    losses = [loss for found in on_own if found for loss in (found[1],)]
    report = LayerReport(
        rank=pair.rank,
        kept=tuple(None if found is None else found[0] for found in on_own),
        loss=sum(losses) / len(losses),
        energy=kept if kept < 1 else None,
    )
    return LowRank(*pair, kernel), report
