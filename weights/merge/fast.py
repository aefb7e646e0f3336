"""ZipRank fast: two whole LoRAs, one pass. The masks of a layer depend on no other layer, so a few layers at a time are
read, solved, built and cast to the dtype of the file, and no float32 factors of other layers are held meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch

from ..lora.low_rank import LowRank
from ..lora.reading import CanonicalLoRA
from ..parallel import Scratch, map_single_threaded
from .alignment import all_targets, common_kernel
from .composed import Pair, merge_few
from .gauge import principal_gauge
from .one_layer import changes_of, figures, merged_layer, single_layer, warn_of_shared_start
from .priors import Prior
from .result import LayerReport, MergedLayers
from .ziprank import DUAL_GAIN, masks_at, masks_of, moments, ridge_for, stack


AT_ONCE = 24  # layers: their small matrices stand side by side, which takes hardly longer than those of one


@dataclass
class _Done:
    """A layer that is through: what was made of it, if anything, and which LoRA has a change of zero there."""

    target: Hashable
    empty: list[bool]
    made: LowRank | None = None
    report: LayerReport | None = None

    def take(self, made: LowRank, report: LayerReport) -> None:
        self.made, self.report = made, report


def merge_fast(
    content: CanonicalLoRA,
    style: CanonicalLoRA,
    strengths: tuple[float, float],
    prior: Prior,
    separation: float,
    keep: bool,
    max_rank: int = 0,
    dtype: torch.dtype | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> MergedLayers:
    """Merge layer by layer. A layer that only one LoRA has passes through at full strength.

    Args:
        content, style: aligned (alignment.py).
        prior: a weight of 0 leaves that LoRA out of the layer.
        separation: γ in [0, 1].
        keep: keep-strength.
        max_rank: 0 keeps every direction that a mask leaves.
        dtype: of the merged factors; None leaves them as they were computed.
        on_step: called once a layer.
    """
    loras, scratch = (content, style), Scratch()

    def composed(targets: list[Hashable]) -> dict[Hashable, tuple[LowRank, LayerReport]]:
        """The layers whose small matrices are enough."""
        groups: dict[tuple[int, int], dict[Hashable, Pair]] = {}
        for target in targets:
            pair = pair_of(target, loras, strengths, max_rank)
            if pair is not None:
                groups.setdefault((len(pair.down_c), len(pair.down_s)), {})[target] = pair
        found = {}
        for pairs in groups.values():
            weights = torch.tensor([prior(target) for target in pairs], dtype=torch.float64)
            found |= merge_few(pairs, weights, separation, keep, dtype, scratch)
        return found

    def few(targets: list[Hashable]) -> list[_Done]:
        done, gauges = {}, {}
        for target, (made, report) in composed(targets).items():
            done[target] = _Done(target, [False, False], made, report)
        for target in targets:
            if target in done:
                continue
            found, weights = changes_of(target, loras, strengths), prior(target)
            empty = [change is None and target in lora.adapters for change, lora in zip(found, loras)]
            done[target] = _Done(target, empty)
            if None not in found:
                gauges[target] = principal_gauge(*found)
            for index, change in enumerate(found):
                if target not in gauges and change is not None and weights[index] > 0:
                    adapter = loras[index].adapters[target]
                    done[target].take(*single_layer(adapter, strengths[index], index, max_rank))
        if gauges:
            m = stack([moments(gauge) for gauge in gauges.values()])
            p_c, p_s = torch.tensor([prior(target) for target in gauges], dtype=torch.float64).T[..., None]
            ridge = ridge_for(next(iter(gauges.values())).up_c.dtype)
            masks = masks_at(m, p_c, p_s, separation, keep, ridge, DUAL_GAIN)
            for index, ((target, gauge), figure) in enumerate(zip(gauges.items(), figures(m, masks))):
                done[target].take(*merged_layer(gauge, masks_of(masks, index, gauge), figure, max_rank))
        for target, layer in done.items():
            if layer.made is not None:
                kernel = common_kernel(target, [lora.adapters.get(target) for lora in loras])
                down, up = layer.made.down, layer.made.up
                if dtype is not None:
                    down, up = down.to(dtype), up.to(dtype)
                layer.made = replace(layer.made, down=down, up=up, kernel=kernel)
        return [done[target] for target in targets]

    result, empty = MergedLayers(), [0, 0]
    targets = all_targets(loras)
    chunks = [targets[first : first + AT_ONCE] for first in range(0, len(targets), AT_ONCE)]
    with map_single_threaded(few, chunks) as chunks_done:
        for layer in itertools.chain.from_iterable(chunks_done):
            on_step()
            empty = [count + nothing for count, nothing in zip(empty, layer.empty)]
            if layer.made is not None:
                result.adapters[layer.target], result.reports[layer.target] = layer.made, layer.report
    result.notes += empty_lines(loras, empty)
    warn_of_shared_start(result)
    return result


def pair_of(
    target: Hashable, loras: tuple[CanonicalLoRA, CanonicalLoRA], strengths: tuple[float, float], max_rank: int
) -> Pair | None:
    """The factors of a layer that both LoRAs have, where `composed` can take them: in float32 or less, with no more
    rows than columns, and without directions that a limit of the rank would cut."""
    found = [lora.adapters.get(target) for lora in loras]
    if None in found or 0 in strengths or 0 in [adapter.scale for adapter in found]:
        return None
    if any(adapter.down.dtype == torch.float64 or not 0 < adapter.rank <= min(adapter.shape) for adapter in found):
        return None
    if max_rank and sum(adapter.rank for adapter in found) > max_rank:
        return None
    factors = [tensor for adapter in found for tensor in (adapter.down, adapter.up)]
    return Pair(*factors, tuple(strength * adapter.scale for strength, adapter in zip(strengths, found)))


def empty_lines(loras: tuple[CanonicalLoRA, CanonicalLoRA], empty: list[int]) -> list[str]:
    """For the report: layers whose change is zero."""
    return [
        f"{lora.label}: {count} layers change nothing (untrained, or strength 0)"
        for lora, count in zip(loras, empty)
        if count
    ]
