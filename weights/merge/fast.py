"""ZipRank of two whole LoRAs: every shared layer in the gauge, all masks in one solve, one-sided layers as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from ..lora.adapters import LowRank
from ..lora.algebra import thin_svd, truncate
from ..lora.factors import Factors
from ..lora.reading import CanonicalLoRA
from ..parallel import map_single_threaded
from .gauge import Gauge, principal_gauge
from .layers import LayerReport, MergedLayers, all_targets
from .priors import Prior
from .ziprank import MAX_TURN, Masks, Moments, build, gains, masks_at, moments, own_loss, ridge_for, stack

DROP = 1e-4  # directions below this share of a layer's largest are noise of training: their inputs prove nothing
SHARED_INIT = 0.8  # mean squared cosine above which the LoRAs must have started from the same random `down`


@dataclass
class Prepared:
    """The shared layers of a content and a style LoRA, strengths included, in the gauge; and the rest.

    one_sided: target → (0 content or 1 style, its change). moments: of all shared layers, side by side.
    """

    targets: list[Hashable]
    gauges: list[Gauge]
    moments: Moments | None
    kernels: list[tuple[int, ...]]
    one_sided: dict[Hashable, tuple[int, LowRank]]
    empty: list[int]

    def layer_masks(self, masks: Masks, index: int) -> Masks:
        """The masks of one layer, without what fills them up."""
        gauge = self.gauges[index]
        n = gauge.cosines.numel()
        turns = (None if turn is None else turn[index, :n] for turn in masks[2:])
        return Masks(masks.content[index, : gauge.up_c.shape[1]], masks.style[index, : gauge.up_s.shape[1]], *turns)

    def ones(self) -> Masks:
        return Masks(torch.ones_like(self.moments.alpha), torch.ones_like(self.moments.beta))


def prepare(
    content: CanonicalLoRA,
    style: CanonicalLoRA,
    strengths: tuple[float, float],
    on_step: Callable[[], None] = lambda: None,
) -> Prepared:
    """Bring every shared layer into the gauge of the principal angles.

    A layer whose change is zero (untrained, or strength 0) counts as not there. `on_step` is called once a layer.
    """
    loras = (content, style)
    targets = all_targets(loras)

    def one(target):
        found = []
        for lora, strength in zip(loras, strengths):
            adapter = lora.adapters.get(target)
            if adapter is None or strength == 0:
                found.append(None)
                continue
            svd = thin_svd(adapter.down, adapter.up * strength, DROP)
            found.append(svd if svd.values.numel() else None)
        if None in found:
            return found, None, None
        gauge = principal_gauge(*found)
        return found, gauge, moments(gauge)

    result = Prepared([], [], None, [], {}, [0, 0])
    each: list[Moments] = []
    with map_single_threaded(one, targets, at_once=8) as done:
        for target, (found, gauge, m) in zip(targets, done):
            on_step()
            kernel = next(lora.adapters[target].kernel for lora in loras if target in lora.adapters)
            for side, lora in enumerate(loras):
                if found[side] is None and target in lora.adapters:
                    result.empty[side] += 1
            if gauge is not None:
                result.targets.append(target)
                result.gauges.append(gauge)
                result.kernels.append(kernel)
                each.append(m)
                continue
            for side, (lora, strength) in enumerate(zip(loras, strengths)):
                if found[side] is not None:  # as it is in the file: nothing speaks against any part of it
                    adapter = lora.adapters[target]
                    result.one_sided[target] = (side, LowRank(adapter.down, adapter.up * strength, kernel))
    result.moments = stack(each) if each else None
    return result


def solve_fast(
    prepared: Prepared, prior: Prior, separation: float, keep: bool, limit: float = MAX_TURN
) -> Masks | None:
    """The closed form for every shared layer at once; None where nothing is shared. `limit` 1: masks alone."""
    if prepared.moments is None:
        return None
    p_c, p_s = prior_columns(prepared, prior)
    ridge = ridge_for(prepared.gauges[0].up_c.dtype)
    return masks_at(prepared.moments, p_c, p_s, separation, keep, ridge, limit)


def prior_columns(prepared: Prepared, prior: Prior) -> tuple[torch.Tensor, torch.Tensor]:
    """The two weights of every shared layer, each (layers, 1) float64."""
    weights = torch.tensor([prior(target) for target in prepared.targets], dtype=torch.float64)
    return weights[:, :1], weights[:, 1:]


def assemble(prepared: Prepared, masks: Masks | None, max_rank: int = 0) -> MergedLayers:
    """The merged LoRA of some masks, and what is to be said of each layer.

    Args:
        masks: as `solve_fast` gives them.
        max_rank: 0 keeps every direction that a mask leaves; else the best approximation of that rank.
    """
    result = MergedLayers()

    def one(index: int) -> Factors:
        made = build(prepared.gauges[index], prepared.layer_masks(masks, index))
        return truncate(made, max_rank) if max_rank else made

    with map_single_threaded(one, range(len(prepared.targets)), at_once=8) as done:
        for target, kernel, made in zip(prepared.targets, prepared.kernels, done):
            result.adapters[target] = LowRank(made.down, made.up, kernel)
    if masks is not None:
        _report(prepared, masks, result)
    for target, (side, adapter) in prepared.one_sided.items():
        pair = Factors(adapter.down, adapter.up)
        pair = truncate(pair, max_rank) if max_rank else pair
        result.adapters[target] = LowRank(pair.down, pair.up, adapter.kernel)
        kept = (1.0, None) if side == 0 else (None, 1.0)
        result.reports[target] = LayerReport(rank=pair.rank, kept=kept)
    return result


def _report(prepared: Prepared, masks: Masks, result: MergedLayers) -> None:
    m = prepared.moments
    kept = [share.tolist() for share in gains(m, masks)]
    loss, plain = own_loss(m, masks).tolist(), own_loss(m, prepared.ones()).tolist()
    for index, (target, gauge) in enumerate(zip(prepared.targets, prepared.gauges)):
        mine, n = prepared.layer_masks(masks, index), gauge.cosines.numel()
        on_content, _, _, on_style = mine.seen(gauge.cosines.double())
        inputs = gauge.down_c.shape[1]
        result.reports[target] = LayerReport(
            rank=result.adapters[target].rank,
            kept=(kept[0][index], kept[1][index]),
            effective=(
                float(on_content.sum() + mine.content[n:].sum()),
                float(on_style.sum() + mine.style[n:].sum()),
            ),
            overlap=float(gauge.cosines.double().square().mean()),
            chance=min(1.0, max(gauge.up_c.shape[1], gauge.up_s.shape[1]) / inputs),
            loss=loss[index],
            loss_sum=plain[index],
        )
    shared = [r.overlap for r in result.reports.values() if r.overlap is not None]
    if shared and sum(shared) / len(shared) > SHARED_INIT:
        result.warnings.append(
            f"the two LoRAs read nearly the same inputs in every layer (mean squared cosine "
            f"{sum(shared) / len(shared):.2f}): most likely they were trained from the same random start (same seed "
            "and trainer), or one from the other. The files then do not tell what belongs to which, and every mask "
            "goes towards one half. Use a lower separation, or the mode calibrated or train."
        )
