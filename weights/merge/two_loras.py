"""Two whole LoRAs with every shared layer held in the gauge: for the modes that measure or train with a model. Mode
fast does without (fast.py)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch

from ..lora.low_rank import LowRank
from ..lora.reading import CanonicalLoRA
from ..parallel import map_single_threaded
from .alignment import all_targets, common_kernel
from .fast import empty_lines
from .gauge import Gauge, principal_gauge
from .one_layer import changes_of, figures, merged_layer, single_layer, warn_of_shared_start
from .priors import EVEN, Prior
from .result import MergedLayers
from .ziprank import Masks, Moments, masks_at, masks_of, moments, ridge_for, stack


@dataclass
class Prepared:
    """The shared layers of a content and a style LoRA, strengths included, in the gauge; and the rest.

    one_sided: target → (0 content or 1 style, its change). moments: of all shared layers, side by side. notes: for the
    report.
    """

    targets: list[Hashable]
    gauges: list[Gauge]
    moments: Moments | None
    kernels: list[tuple[int, ...]]
    one_sided: dict[Hashable, tuple[int, LowRank]]
    prior: Prior
    notes: list[str]

    def layer_masks(self, masks: Masks, index: int) -> Masks:
        """The masks of one layer, without what fills them up."""
        return masks_of(masks, index, self.gauges[index])


def prepare(
    content: CanonicalLoRA,
    style: CanonicalLoRA,
    strengths: tuple[float, float],
    prior: Prior = lambda target: EVEN,
    on_step: Callable[[], None] = lambda: None,
) -> Prepared:
    """Bring every shared layer into the gauge of the principal angles.

    A layer whose change is zero (untrained, or strength 0) counts as not there. `on_step` is called once a layer.
    """
    loras = (content, style)
    targets = all_targets(loras)

    def one(target):
        found = changes_of(target, loras, strengths)
        if None in found:
            return found, None, None
        gauge = principal_gauge(*found)
        return found, gauge, moments(gauge)

    result = Prepared([], [], None, [], {}, prior, [])
    each: list[Moments] = []
    empty = [0, 0]
    with map_single_threaded(one, targets, at_once=8) as done:
        for target, (found, gauge, m) in zip(targets, done):
            on_step()
            kernel = common_kernel(target, [lora.adapters.get(target) for lora in loras])
            for index, (lora, change, strength) in enumerate(zip(loras, found, strengths)):
                if change is None:
                    empty[index] += target in lora.adapters
                elif gauge is None:
                    down, up = lora.adapters[target].factors(strength)
                    result.one_sided[target] = (index, LowRank(down, up, kernel))
            if gauge is not None:
                result.targets.append(target)
                result.gauges.append(gauge)
                result.kernels.append(kernel)
                each.append(m)
    result.moments = stack(each) if each else None
    result.notes = empty_lines(loras, empty)
    return result


def solve_prepared(prepared: Prepared, separation: float, keep: bool) -> Masks | None:
    """The closed form for every shared layer at once, masks alone (no dual basis): where the other modes start. None
    where nothing is shared."""
    if prepared.moments is None:
        return None
    p_c, p_s = prior_columns(prepared, prepared.prior)
    return masks_at(prepared.moments, p_c, p_s, separation, keep, ridge_for(prepared.gauges[0].up_c.dtype))


def prior_columns(prepared: Prepared, prior: Prior) -> tuple[torch.Tensor, torch.Tensor]:
    """The two weights of every shared layer, each (layers, 1) float64."""
    weights = torch.tensor([prior(target) for target in prepared.targets], dtype=torch.float64).reshape(-1, 2)
    return weights[:, :1], weights[:, 1:]


def assemble(prepared: Prepared, masks: Masks | None, max_rank: int = 0) -> MergedLayers:
    """The merged LoRA of some masks, and what is to be said of each layer.

    Args:
        masks: of all shared layers, filled up side by side.
        max_rank: 0 keeps every direction that a mask leaves; else the best approximation of that rank.
    """
    result = MergedLayers(notes=list(prepared.notes))

    each = [] if masks is None else figures(prepared.moments, masks)

    def one(index: int):
        return merged_layer(prepared.gauges[index], prepared.layer_masks(masks, index), each[index], max_rank)

    with map_single_threaded(one, range(len(prepared.targets)), at_once=8) as done:
        for target, kernel, (made, report) in zip(prepared.targets, prepared.kernels, done):
            result.adapters[target], result.reports[target] = replace(made, kernel=kernel), report
    for target, (index, adapter) in prepared.one_sided.items():
        if prepared.prior(target)[index] > 0:
            result.adapters[target], result.reports[target] = single_layer(adapter, 1.0, index, max_rank)
    warn_of_shared_start(result)
    return result
