"""Merging any number of whole LoRAs by one of the methods."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from ..errors import StyleLoomError
from ..lora.algebra import ThinSVD, cut, frobenius_norm, thin_svd
from ..lora.low_rank import LowRank
from ..lora.reading import CanonicalLoRA
from ..parallel import map_single_threaded
from .alignment import all_targets, common_kernel
from .measure import own_input, sum_size
from .methods import AVERAGE, METHODS, Options
from .result import LayerReport, MergedLayers


def pass_through_factors(method: str, strengths: list[float]) -> list[float]:
    """What each LoRA's parts count where no method combines them (layers that only one LoRA has; full differences of
    weights, biases and norms): its strength, and with `average` its strength over the number of LoRAs in the merge."""
    return [strength / _count(strengths) for strength in strengths] if method == AVERAGE else list(strengths)


def _count(strengths: list[float]) -> int:
    """LoRAs in the merge: a strength of 0 leaves one out."""
    return sum(strength != 0 for strength in strengths) or 1


def merge_many(
    loras: list[CanonicalLoRA],
    strengths: list[float],
    method: str,
    options: Options,
    max_rank: int = 0,
    energy: float = 1.0,
    dtype: torch.dtype | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> MergedLayers:
    """Merge layer by layer. A layer that only one LoRA has passes through, with `pass_through_factors`.

    Args:
        loras: aligned (alignment.py).
        options: as for the methods; `count`, `rank` and `target` are set here.
        max_rank: 0 for no limit. TIES and DARE, whose results have full rank, then keep the sum of the ranks.
        energy: share of each layer's ‖ΔW‖² to keep, 1 for all.
        dtype: of the merged factors; None leaves them as they were computed.

    Raises:
        StyleLoomError: an unknown method, fewer than two LoRAs.
    """
    if method not in METHODS:
        raise StyleLoomError(f"method is {method!r}", f"one of {', '.join(METHODS)}", "Choose one of these.")
    if len(loras) < 2:
        raise StyleLoomError(f"{len(loras)} LoRA to merge", "two or more", "Connect a second LoRA.")
    targets = all_targets(loras)
    options = replace(options, count=_count(strengths))
    result = MergedLayers()

    def one(target: Hashable) -> tuple[LowRank, LayerReport] | None:
        found = [lora.adapters.get(target) for lora in loras]
        changes = [_change(adapter, strength) for adapter, strength in zip(found, strengths)]
        if all(change is None for change in changes):
            return None
        made, report = _merged(target, changes, method, options, max_rank, energy)
        down, up = (made.down, made.up) if dtype is None else (made.down.to(dtype), made.up.to(dtype))
        return replace(made, down=down, up=up, kernel=common_kernel(target, found)), report

    with map_single_threaded(one, targets, at_once=1 if method in ("TIES", "DARE") else 8) as done:
        for target, found in zip(targets, done):
            on_step()
            if found is not None:
                result.adapters[target], result.reports[target] = found
    return result


def _change(adapter: LowRank | None, strength: float) -> ThinSVD | None:
    """One LoRA's change of a layer; None where there is none, or it is zero."""
    if adapter is None or strength == 0:
        return None
    svd = thin_svd(*adapter.factors(strength))
    return svd if svd.values.numel() else None


def _merged(
    target: Hashable, changes: list[ThinSVD | None], method: str, options: Options, max_rank: int, energy: float
) -> tuple[LowRank, LayerReport]:
    there = [change for change in changes if change is not None]
    plain = sum_size(there)
    if len(there) == 1:
        factor = 1 / options.count if method == AVERAGE else 1.0
        pair, left = cut(there[0]._replace(values=there[0].values * factor).low_rank(), max_rank, energy)
        kept = tuple(None if change is None else factor for change in changes)
        return pair, LayerReport(pair.rank, kept, plain * factor * left**0.5, plain, left)
    ranks = sum(change.values.numel() for change in there)
    made, left = METHODS[method](there, replace(options, rank=max_rank or ranks, target=str(target)))
    pair, more = cut(made, max_rank, energy)
    on_own = [None if change is None else own_input(pair, change) for change in changes]
    losses = [found[1] for found in on_own if found is not None]
    kept = tuple(None if found is None else found[0] for found in on_own)
    size = frobenius_norm(pair)
    return pair, LayerReport(pair.rank, kept, size, plain, left * more, sum(losses) / len(losses))
