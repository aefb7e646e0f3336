"""One layer of a content and a style LoRA: read its factors, and write the merged ones with their report."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch

from ..lora.algebra import ThinSVD, cut, frobenius_norm, thin_svd
from ..lora.low_rank import LowRank
from ..lora.reading import CanonicalLoRA
from .gauge import Gauge, content_and_style
from .measure import own_input
from .result import LayerReport, MergedLayers
from .ziprank import Masks, Moments, build, gains, own_loss, squared_sizes

DROP = 1e-4  # directions below this share of a layer's largest are noise of training: their inputs prove nothing
SHARED_START = 0.8  # mean squared cosine above which the LoRAs must have started from the same random `down`


def changes_of(
    target: Hashable, loras: tuple[CanonicalLoRA, CanonicalLoRA], strengths: tuple[float, float]
) -> list[ThinSVD | None]:
    """Content's and style's change of a layer, strengths included; None where there is none, or it is zero (untrained,
    or strength 0)."""
    found: list[ThinSVD | None] = []
    for lora, strength in zip(loras, strengths):
        adapter = lora.adapters.get(target)
        svd = None if adapter is None or strength == 0 else thin_svd(*adapter.factors(strength), DROP)
        found.append(svd if svd is not None and svd.values.numel() else None)
    return found


def figures(m: Moments, masks: Masks) -> list[dict]:
    """What a report says of each layer, by the names of `LayerReport`; moments and masks stand side by side."""
    ones = Masks(torch.ones_like(m.alpha), torch.ones_like(m.beta))
    sizes = [squared.clamp_min(0).sqrt() for squared in squared_sizes(m, masks)]
    losses = own_loss(m, masks), own_loss(m, ones)
    on_content, _, _, on_style = masks.responses(m.cosines)
    n = m.cosines.shape[-1]
    effective, ranks = [], []
    for power, mask, paired in ((m.alpha, masks.content, on_content), (m.beta, masks.style, on_style)):
        there = power > 0  # what fills the shorter layers up weighs nothing
        effective.append((torch.cat((paired, mask[..., n:]), -1) * there).sum(-1))
        ranks.append(there.sum(-1))
    overlap = m.cosines.square().sum(-1) / torch.minimum(*ranks)
    columns = [torch.stack(pair, -1).tolist() for pair in (gains(m, masks), effective, sizes, losses)]
    return [
        {
            "kept": tuple(kept),
            "effective": tuple(both),
            "size": size,
            "sum_size": plain,
            "loss": loss,
            "loss_sum": loss_sum,
            "overlap": cosine,
        }
        for kept, both, (size, plain), (loss, loss_sum), cosine in zip(*columns, overlap.tolist())
    ]


def chance_overlap(down_c: torch.Tensor, down_s: torch.Tensor) -> float:
    """The mean squared cosine that row spaces of these sizes, (rank, in), have by chance."""
    return min(1.0, max(down_c.shape[0], down_s.shape[0]) / down_c.shape[1])


def merged_layer(gauge: Gauge, masks: Masks, figure: dict, max_rank: int = 0) -> tuple[LowRank, LayerReport]:
    """The merged change of a layer that both LoRAs have, and its report.

    Args:
        masks: of this layer alone.
        figure: of this layer, out of `figures`.
        max_rank: 0 keeps every direction that a mask leaves; else the best approximation of that rank.
    """
    made, energy = cut(build(gauge, masks), max_rank)
    chance = chance_overlap(gauge.down_c, gauge.down_s)
    report = LayerReport(rank=made.rank, energy=energy, chance=chance, **figure)
    if energy < 1:
        report.kept, report.loss = on_own_inputs(made, gauge)
        report.size *= energy**0.5
    return made, report


def on_own_inputs(merged: LowRank, gauge: Gauge) -> tuple[tuple[float, float], float]:
    """((share of content, share of style) that is left, own-input loss) of any change of this layer."""
    found = [own_input(merged, change) for change in content_and_style(gauge)]
    return tuple(share for share, _ in found), sum(loss for _, loss in found) / 2


def single_layer(adapter: LowRank, strength: float, index: int, max_rank: int = 0) -> tuple[LowRank, LayerReport]:
    """A layer that only one LoRA has (0 content, 1 style), as it is in the file: nothing speaks against any part of
    it."""
    down, up = adapter.factors(strength)
    pair, energy = cut(replace(adapter, down=down, up=up, scale=1.0), max_rank)
    size = frobenius_norm(pair)
    kept = (1.0, None) if index == 0 else (None, 1.0)
    return pair, LayerReport(pair.rank, kept, size, size / energy**0.5, energy)


def warn_of_shared_start(merged: MergedLayers) -> None:
    """A warning where the two LoRAs were most likely trained from the same random `down`."""
    overlaps = [report.overlap for report in merged.reports.values() if report.overlap is not None]
    overlap = sum(overlaps) / len(overlaps) if overlaps else 0.0
    if overlap > SHARED_START:
        merged.warnings.append(
            f"the two LoRAs read nearly the same inputs in every layer (mean squared cosine {overlap:.2f}): most "
            "likely they were trained from the same random start (same seed and trainer), or one from the other. The "
            "files then do not tell what belongs to which, and every mask goes towards one half. Use a lower "
            "separation, or the mode calibrated or train."
        )
