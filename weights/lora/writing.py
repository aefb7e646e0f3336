"""Writing merged factors as a LORA_MODEL, in the names and with the alphas that hosts and tools read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from ..errors import StyleLoomError
from ..parallel import single_threaded
from .kinds import LORA, is_finite
from .kinds.base import wide
from .lora_model import LoRAModel
from .low_rank import LowRank
from .names import written_stem
from .reading import CanonicalLoRA
from .sdxl_names import clip_key_map, sdxl_key_map


def names_of(key_map: Mapping[str, Hashable]) -> dict[Hashable, list[str]]:
    """Every name of each target."""
    found: dict[Hashable, list[str]] = {}
    for name, target in key_map.items():
        found.setdefault(target, []).append(name)
    return found


@single_threaded()  # it looks through every tensor once
def write_lora(
    adapters: Mapping[Hashable, LowRank],
    other: Mapping[tuple[Hashable, str], torch.Tensor],
    sources: list[CanonicalLoRA],
    family: str,
    key_map: Mapping[str, Hashable] | None,
    metadata: Mapping[str, str],
) -> LoRAModel:
    """A LORA_MODEL of low-rank changes.

    SDXL and SD1.5 are written as kohya does (`lora_unet_….lora_up/.lora_down/.alpha`, alpha = rank, so the scale is 1
    and every layer has a rank of its own), as are LoRAs whose names no map knows and that came in that spelling;
    everything else as `….lora_A/.lora_B` without alpha.

    Args:
        sources: for the dtype (the wider of theirs), and the names of targets that no map knows.
        key_map: of the model; None: the built-in one.

    Raises:
        StyleLoomError: values that the dtype cannot hold; nothing to write.
    """
    if key_map is None:
        key_map = sdxl_key_map() if family == "sdxl" else clip_key_map()
    names = names_of(key_map)
    dtype = written_dtype(sources)
    loaded = _storages(sources)
    given = {target: stem for source in reversed(sources) for target, stem in source.stems.items()}
    adapters, other = _one_change_a_weight(adapters, other)
    tensors: dict[str, torch.Tensor] = {}
    for target, adapter in adapters.items():
        stem = written_stem(target, names, family, given.get(target, str(target)))
        out, inner, *kernel = adapter.weight_shape
        up = adapter.up if adapter.scale == 1.0 else adapter.factors()[1]
        down = _cast(adapter.down.reshape(adapter.rank, inner, *kernel), dtype, stem, loaded)
        up = _cast(up.reshape(out, adapter.rank, *[1] * len(kernel)), dtype, stem, loaded)
        dotted = "." in stem
        down_name, up_name = LORA.peft if dotted and not kernel else LORA.kohya
        tensors |= {f"{stem}.{down_name}": down, f"{stem}.{up_name}": up}
        if not dotted:  # in float32: half precision cannot hold every rank
            tensors[f"{stem}.alpha"] = torch.tensor(float(adapter.rank))
    for (target, part), tensor in other.items():
        stem = written_stem(target, names, family, given.get(target, str(target)))
        tensors[f"{stem}.{part}"] = _cast(tensor, dtype, stem, loaded) if part != "reshape_weight" else tensor
    if not tensors:
        raise StyleLoomError(
            "the merged LoRA is empty: every change in it is zero",
            "LoRAs that change something, at a strength other than 0",
            "Raise the strengths, or look at the LoRAs: they may be untrained.",
        )
    return LoRAModel(tensors, metadata)


def _one_change_a_weight(
    adapters: Mapping[Hashable, LowRank], other: Mapping[tuple[Hashable, str], torch.Tensor]
) -> tuple[dict[Hashable, LowRank], dict[tuple[Hashable, str], torch.Tensor]]:
    """The same changes with at most one tensor or pair for each weight and each bias: of several under one name the
    host keeps the last and drops the others without a word. They are added up, low-rank changes multiplied out.

    Raises:
        StyleLoomError: a change of a weight that another LoRA replaces; changes of one weight with two sizes.
    """
    adapters, other = dict(adapters), dict(other)
    for target in dict.fromkeys(target for target, _ in other):
        full = [(target, part) for part in ("diff", "w_norm") if (target, part) in other]
        if (target, "set_weight") in other and (full or target in adapters):
            raise StyleLoomError(
                f"{target} is replaced by one LoRA (set_weight) and changed by another",
                "LoRAs of which none replaces what another changes",
                "These LoRAs cannot be merged: load them one after the other.",
            )
        if full and target in adapters:
            adapter = adapters.pop(target)
            down, up = adapter.factors()
            change = (up @ down).reshape(adapter.weight_shape)
            other[target, "diff"] = _sum(target, change, *(other.pop(row) for row in full))
        elif len(full) == 2:
            other[target, "diff"] = _sum(target, *(other.pop(row) for row in full))
        # The host reads b_norm only beside w_norm.
        if (target, "b_norm") in other and ((target, "w_norm") not in other or (target, "diff_b") in other):
            given = [other.pop((target, part)) for part in ("b_norm", "diff_b") if (target, part) in other]
            other[target, "diff_b"] = _sum(target, *given)
    return adapters, other


def _sum(target: Hashable, *changes: torch.Tensor) -> torch.Tensor:
    """In float32 or better, in the shape of the last; a change may have the kernel of one pixel or not."""
    shape = changes[-1].shape
    if any(change.numel() != changes[-1].numel() or change.shape[0] != shape[0] for change in changes):
        raise StyleLoomError(
            f"changes of {target} have the shapes {', '.join(str(list(change.shape)) for change in changes)}",
            "one shape for one weight",
            "Choose LoRAs that were trained on the same base model.",
        )
    return changes[0] if len(changes) == 1 else sum(wide(change).reshape(shape) for change in changes)


def written_dtype(sources: list[CanonicalLoRA]) -> torch.dtype:
    """What a merge of these is written in: the widest of theirs."""
    dtype = sources[0].dtype
    for source in sources[1:]:
        dtype = torch.promote_types(dtype, source.dtype)
    return dtype


def _storages(sources: list[CanonicalLoRA]) -> set[int]:
    """Where the memory of the loaded LoRAs begins."""
    tensors = [t for source in sources for pair in source.adapters.values() for t in (pair.down, pair.up)]
    tensors += [tensor for source in sources for tensor in source.other.values()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _cast(tensor: torch.Tensor, dtype: torch.dtype, stem: str, loaded: set[int]) -> torch.Tensor:
    """In the dtype, checked, and in memory that no loaded LoRA shares; what is so already is not copied."""
    made = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and not is_finite(made):
        raise StyleLoomError(
            f"{stem}: the merged change is too large for fp16",
            "at most 65504",
            "Lower the strengths.",
        )
    return made.clone() if made.untyped_storage().data_ptr() in loaded else made
