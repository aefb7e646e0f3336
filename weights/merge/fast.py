"""ZipRank fast: two whole LoRAs, one pass. The masks of a layer depend on no other layer, so each layer is read, solved,
built and cast to the dtype of the file before it is handed on, and no factors of other layers are held meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from ..lora.low_rank import LowRank
from ..lora.reading import CanonicalLoRA
from ..parallel import map_single_threaded
from .alignment import all_targets, common_kernel
from .gauge import principal_gauge
from .one_layer import changes_of, merged_layer, single_layer, warn_of_shared_start
from .priors import Prior
from .result import LayerReport, MergedLayers
from .ziprank import DUAL_GAIN, masks_at, moments, ridge_for


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
    loras = (content, style)

    def one(target: Hashable) -> tuple[LowRank | None, LayerReport | None, list[bool]]:
        found, weights = changes_of(target, loras, strengths), prior(target)
        empty = [change is None and target in lora.adapters for change, lora in zip(found, loras)]
        made = report = None
        if None not in found:
            gauge = principal_gauge(*found)
            m = moments(gauge)
            masks = masks_at(m, *weights, separation, keep, ridge_for(gauge.up_c.dtype), DUAL_GAIN)
            made, report = merged_layer(gauge, m, masks, max_rank)
        else:
            for index, change in enumerate(found):
                if change is not None and weights[index] > 0:
                    made, report = single_layer(loras[index].adapters[target], strengths[index], index, max_rank)
        if made is not None:
            kernel = common_kernel(target, [lora.adapters.get(target) for lora in loras])
            down, up = (made.down, made.up) if dtype is None else (made.down.to(dtype), made.up.to(dtype))
            made = replace(made, down=down, up=up, kernel=kernel)
        return made, report, empty

    result, empty = MergedLayers(), [0, 0]
    targets = all_targets(loras)
    with map_single_threaded(one, targets, at_once=8) as done:
        for target, (made, report, nothing) in zip(targets, done):
            on_step()
            empty = [count + change for count, change in zip(empty, nothing)]
            if made is not None:
                result.adapters[target], result.reports[target] = made, report
    result.notes += empty_lines(loras, empty)
    warn_of_shared_start(result)
    return result


def empty_lines(loras: tuple[CanonicalLoRA, CanonicalLoRA], empty: list[int]) -> list[str]:
    """For the report: layers whose change is zero."""
    return [
        f"{lora.label}: {count} layers change nothing (untrained, or strength 0)"
        for lora, count in zip(loras, empty)
        if count
    ]
