"""What several LoRAs have in common: layers with one target in the same slices, and those that only one of them has."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch

from ..errors import StyleLoomError
from ..lora.low_rank import LowRank
from ..lora.reading import CanonicalLoRA

WeightShape = Callable[[str], tuple[int, ...] | None]


@dataclass
class LayerReport:
    """What became of one target: rank in the file, how much of each LoRA is left on its own inputs (`kept`); for
    ZipRank the effective ranks (sums of what is left of each direction) and the mean squared cosine; own-input
    losses."""

    rank: int = 0
    kept: tuple[float | None, ...] = ()
    effective: tuple[float, ...] = ()
    overlap: float | None = None
    chance: float | None = None
    loss: float | None = None
    loss_sum: float | None = None
    energy: float | None = None


@dataclass
class MergedLayers:
    """Low-rank changes by target, a report for each, and lines for the artist."""

    adapters: dict[Hashable, LowRank] = field(default_factory=dict)
    reports: dict[Hashable, LayerReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _key(target: Hashable) -> Hashable:
    return target[0] if isinstance(target, tuple) else target


def _widen(target, adapter: LowRank, shape: tuple[int, ...]) -> LowRank:
    """The change of a slice as one of the whole weight: zeros around it."""
    axis, start, length = target[1]
    size = shape[0] if axis == 0 else math.prod(shape[1:])
    if axis == 0:
        up = adapter.up.new_zeros(size, adapter.rank)
        up[start : start + length] = adapter.up
        return LowRank(adapter.down, up, adapter.kernel)
    down = adapter.down.new_zeros(adapter.rank, size)
    down[:, start : start + length] = adapter.down
    return LowRank(down, adapter.up, adapter.kernel)


def align(loras: list[CanonicalLoRA], weight_shape: WeightShape | None) -> None:
    """Bring LoRAs of one model to the same targets, in place: where one has a fused weight whole (or in other slices)
    and another in slices, the slices become changes of the whole weight, exactly."""
    cuts: dict[Hashable, set] = {}
    for lora in loras:
        for target in lora.adapters:
            cuts.setdefault(_key(target), set()).add(target[1] if isinstance(target, tuple) else None)
    for key, found in cuts.items():
        spans = sorted(cut for cut in found if cut is not None)
        clash = any(a[0] != b[0] or a[1] + a[2] > b[1] for a, b in zip(spans, spans[1:]))
        if (None in found and spans) or clash:
            for lora in loras:
                _join(lora, key, weight_shape)


def _join(lora: CanonicalLoRA, key: Hashable, weight_shape: WeightShape | None) -> None:
    parts = [t for t in lora.adapters if _key(t) == key]
    if not any(isinstance(t, tuple) for t in parts):
        return
    shape = weight_shape(key) if weight_shape else None
    if shape is None:
        raise StyleLoomError(f"{lora.label}: {key} comes in slices", "the model that they belong to", "Connect model.")
    widened = [_widen(t, lora.adapters[t], shape) if isinstance(t, tuple) else lora.adapters[t] for t in parts]
    stem = lora.stems[parts[0]]
    for target in parts:
        del lora.adapters[target], lora.stems[target]
    lora.adapters[key] = LowRank(
        torch.cat([w.down for w in widened]), torch.cat([w.up for w in widened], 1), widened[0].kernel
    )
    lora.stems[key] = stem


def check_sizes(loras: list[CanonicalLoRA], weight_shape: WeightShape | None) -> None:
    """Raise StyleLoomError where LoRAs change one weight as if it had two sizes, or another than the model's."""
    for lora in loras:
        for target, adapter in lora.adapters.items():
            if weight_shape is None:
                continue
            shape = list(weight_shape(_key(target)) or ())
            if isinstance(target, tuple):
                shape[target[1][0]] = target[1][2]
            if shape and (shape[0], math.prod(shape[1:])) != adapter.shape:
                raise StyleLoomError(
                    f"{lora.label}: {lora.stems[target]} is for a weight of {list(adapter.shape)}, and the model's "
                    f"{_key(target)} is {shape}",
                    "a LoRA for this model",
                    "Use LoRAs and a model of one kind.",
                )
    first = loras[0]
    for lora in loras[1:]:
        for target, adapter in lora.adapters.items():
            other = first.adapters.get(target)
            if other is not None and other.shape != adapter.shape:
                raise StyleLoomError(
                    f"{target} is {list(other.weight_shape)} in {first.label} and {list(adapter.weight_shape)} in "
                    f"{lora.label}: these LoRAs are for two different models",
                    "LoRAs for one base model",
                    "Choose LoRAs that were trained on the same base model.",
                )
    if weight_shape is None:
        _check_family(loras)


def _check_family(loras: list[CanonicalLoRA]) -> None:
    """Without a model only names can tell that LoRAs do not belong together."""
    families = {lora.family for lora in loras}
    every = [set(lora.adapters) | {target for target, _ in lora.other} for lora in loras]
    strangers = any(not (every[0] & other) for other in every[1:]) and families != {"sdxl"}
    if len(families) > 1 or strangers:
        kinds = ", ".join(f"{lora.label} {'SDXL' if lora.family else 'not SDXL'}" for lora in loras)
        raise StyleLoomError(
            f"these LoRAs seem to be for different models ({kinds}; first layers: "
            + ", ".join(next(iter(lora.stems.values())) for lora in loras)
            + ")",
            "LoRAs for one base model",
            "Choose LoRAs of one base model. If they are, and only their names differ, connect model: then the names "
            "are matched through ComfyUI.",
        )


def all_targets(loras: Iterable[CanonicalLoRA]) -> list[Hashable]:
    """Every target of any of them, in the order of their files."""
    return list(dict.fromkeys(target for lora in loras for target in lora.adapters))


def pass_other(loras: list[CanonicalLoRA], strengths: list[float], notes: list[str]) -> dict:
    """Full differences, biases and norms: added up with their strengths, as loading the LoRAs one by one would."""
    found: dict[tuple[Hashable, str], torch.Tensor] = {}
    for lora, strength in zip(loras, strengths):
        for (target, part), tensor in lora.other.items():
            if part in ("set_weight", "reshape_weight"):
                if (target, part) in found and not torch.equal(found[target, part], tensor):
                    raise StyleLoomError(
                        f"two LoRAs set {target} ({part}) to different values",
                        "at most one that does",
                        "These LoRAs cannot be merged: load them one after the other.",
                    )
                found[target, part] = tensor
            elif (target, part) in found:
                found[target, part] = found[target, part].float() + strength * tensor.float()
            else:
                found[target, part] = tensor if strength == 1 else tensor.float() * strength
    if found:
        notes.append(f"{len(found)} full differences (biases, norms) are added up as they are")
    return found
