"""What several LoRAs have in common: layers with one target in the same slices, and those that only one of them has."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace

from ..errors import StyleLoomError
from ..lora.algebra import concatenate
from ..lora.low_rank import LowRank
from ..lora.reading import CanonicalLoRA
from .targets import key_of, name_of, plain_targets, slice_of

WeightShape = Callable[[str], tuple[int, ...] | None]


def align(loras: list[CanonicalLoRA], weight_shape: WeightShape | None) -> None:
    """Bring LoRAs of one model to the same targets, in place. Where one has a fused weight whole (or in other slices)
    and another in slices, the slices become changes of the whole weight, exactly."""
    for lora in loras:
        plain_targets(lora)
    cuts: dict[Hashable, set] = {}
    for lora in loras:
        for target in lora.adapters:
            cuts.setdefault(key_of(target), set()).add(slice_of(target))
    for key, found in cuts.items():
        spans = sorted(cut for cut in found if cut is not None)
        clash = any(a[0] != b[0] or a[1] + a[2] > b[1] for a, b in zip(spans, spans[1:]))
        if (None in found and spans) or clash:
            for lora in loras:
                _join(lora, key, weight_shape)


def _widen(target: Hashable, adapter: LowRank, shape: tuple[int, ...]) -> LowRank:
    """The change of a slice as one of the whole weight: zeros around it."""
    axis, start, length = slice_of(target)
    size = shape[0] if axis == 0 else math.prod(shape[1:])
    down, up = adapter.factors()
    if axis == 0:
        whole = up.new_zeros(size, adapter.rank)
        whole[start : start + length] = up
        return LowRank(down, whole, adapter.kernel)
    whole = down.new_zeros(adapter.rank, size)
    whole[:, start : start + length] = down
    return LowRank(whole, up, adapter.kernel)


def _join(lora: CanonicalLoRA, key: Hashable, weight_shape: WeightShape | None) -> None:
    parts = [t for t in lora.adapters if key_of(t) == key]
    if all(slice_of(t) is None for t in parts):
        return
    shape = weight_shape(key) if weight_shape else None
    if shape is None:
        raise StyleLoomError(f"{lora.label}: {key} comes in slices", "the model that they belong to", "Connect model.")
    widened = [lora.adapters[t] if slice_of(t) is None else _widen(t, lora.adapters[t], shape) for t in parts]
    stem = lora.stems[parts[0]]
    for target in parts:
        del lora.adapters[target]
        if all(t != target for t, _ in lora.other):
            del lora.stems[target]
    lora.adapters[key] = replace(concatenate(widened, [1.0] * len(widened)), kernel=widened[0].kernel)
    lora.stems[key] = stem


def common_kernel(target: Hashable, adapters: Iterable[LowRank | None]) -> tuple[int, ...]:
    """The kernel of a layer, from those adapters that know it; () for a linear layer.

    Raises:
        StyleLoomError: two that know different ones.
    """
    known = {adapter.kernel for adapter in adapters if adapter is not None and math.prod(adapter.kernel) > 1}
    if len(known) > 1:
        kernels = " and ".join(str(list(kernel)) for kernel in sorted(known))
        raise StyleLoomError(
            f"{name_of(target)} is a convolution with the kernels {kernels}: these LoRAs are for two different models",
            "LoRAs for one base model",
            "Choose LoRAs that were trained on the same base model.",
        )
    every = [adapter.kernel for adapter in adapters if adapter is not None]
    return known.pop() if known else max(every, key=len)


def check_sizes(loras: list[CanonicalLoRA], weight_shape: WeightShape | None) -> None:
    """Raise StyleLoomError where LoRAs change one weight as if it had two sizes, or another than the model's."""
    for lora in loras:
        for target, adapter in lora.adapters.items():
            if weight_shape is None:
                continue
            shape = list(weight_shape(key_of(target)) or ())
            part = slice_of(target)
            if shape and part is not None:
                shape[part[0]] = part[2]
            if shape and (shape[0], math.prod(shape[1:])) != adapter.shape:
                raise StyleLoomError(
                    f"{lora.label}: {lora.stems[target]} is for a weight of {list(adapter.shape)}, and the model's "
                    f"{name_of(target)} is {shape}",
                    "a LoRA for this model",
                    "Use LoRAs and a model of one kind.",
                )
    for target in all_targets(loras):
        first, *others = [lora for lora in loras if target in lora.adapters]
        adapter = first.adapters[target]
        for lora in others:
            other = lora.adapters[target]
            if other.shape != adapter.shape:
                raise StyleLoomError(
                    f"{name_of(target)} is {list(adapter.weight_shape)} in {first.label} and "
                    f"{list(other.weight_shape)} in {lora.label}: these LoRAs are for two different models",
                    "LoRAs for one base model",
                    "Choose LoRAs that were trained on the same base model.",
                )
        common_kernel(target, [lora.adapters.get(target) for lora in loras])
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
