"""A LoRA of any format in canonical form: low-rank changes by target weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import StyleLoomError
from ..parallel import single_threaded
from .keys import group_keys, tensors_of
from .kinds import BIAS_CHANGE, check_finite_parts, kinds_of, low_rank
from .low_rank import LowRank
from .names import bare, find_target, is_text_key
from .sdxl_names import sdxl_kernels, sdxl_key_map

WeightShape = Callable[[str], tuple[int, ...] | None]
_CUT = ".row_offset"  # written by ComfyUI's own conversion of fused LoKr files
_SDXL_SHARE = 0.9  # of a file's UNet layers that must be SDXL's; an SD1.5 LoRA reaches a half


@dataclass
class CanonicalLoRA:
    """What a LoRA file says, independent of its spelling.

    label: what messages call it. adapters: low-rank change by target. other: full differences, biases and norms by
    (target, part), as they are. stems: the file's own name of each target. unknown: keys that found no place. kinds:
    how many adapters of which kind. family: 'sdxl' where the built-in map recognised it, else ''. dtype: of its
    tensors.
    """

    label: str
    adapters: dict[Hashable, LowRank] = field(default_factory=dict)
    other: dict[tuple[Hashable, str], torch.Tensor] = field(default_factory=dict)
    stems: dict[Hashable, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    family: str = ""
    dtype: torch.dtype = torch.float32


def looks_like_sdxl(stems: Iterable[str]) -> bool:
    """Whether the layers of the diffusion model that a LoRA names are those of SDXL."""
    stems = list(stems)
    unet = [stem for stem in stems if not is_text_key(stem)]
    known = sum(find_target(stem, sdxl_key_map()) is not None for stem in unet)
    return known >= _SDXL_SHARE * max(1, len(unet)) if unet else any(stem.startswith("lora_te2") for stem in stems)


def _common_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    dtype = None
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() > 1:
            found = torch.bfloat16 if tensor.element_size() == 1 else tensor.dtype
            dtype = found if dtype is None else torch.promote_types(dtype, found)
    return dtype or torch.float32


@single_threaded()  # it looks through every tensor once
def read_lora(
    lora: Mapping[str, torch.Tensor],
    label: str,
    key_map: Mapping[str, Hashable] | None = None,
    weight_shape: WeightShape | None = None,
) -> CanonicalLoRA:
    """Canonical form of a LoRA.

    Args:
        lora: LORA_MODEL, any format.
        label: for messages, e.g. "content_lora".
        key_map: names → targets of a model. None: SDXL's built-in one where the layers are SDXL's, else the file's own
            names, without what trainers put before them and with `_` for `.`.
        weight_shape: name of a weight of the model → its shape, None where it is not at hand. It says what kernel a
            convolution has: LyCORIS writes some as matrices. Without a model the built-in table of SDXL says it.

    Returns:
        As float32 (float64 where the file is). With a key map, what is not in it stands in `unknown`.

    Raises:
        StyleLoomError: empty, no LoRA at all, a kind that cannot be merged, damaged, NaN; a convolution of another
            kernel than the model's; no layer of it in the key map.
    """
    if not lora:
        raise StyleLoomError(f"{label} is empty", "at least one adapter", "Look at the node that makes it.")
    strange = [key for key, value in lora.items() if not isinstance(value, torch.Tensor)]
    stems, unknown = group_keys({k: v for k, v in lora.items() if isinstance(v, torch.Tensor)})
    useful = {stem: parts for stem, parts in stems.items() if set(parts) - {"alpha"}}
    if not useful or strange or len(unknown) > len(lora) // 2:
        first = ", ".join(list(map(str, unknown or strange or lora))[:3])
        raise StyleLoomError(
            f"{label}: this is no LoRA: {len(useful)} of its {len(lora)} tensors make an adapter (others: {first})",
            "a LoRA, LoCon, LoHa or LoKr",
            "Choose a LoRA. A checkpoint or diffusion model belongs into its own loader.",
        )
    cut = [key for key in unknown if key.endswith(_CUT)]
    if cut:
        raise StyleLoomError(
            f"{label}: {len(cut)} LoKr are cut from a fused layer, with the whole first factor and the row where the "
            f"part begins: {cut[0]}",
            "adapters of whole layers, or low-rank ones",
            "Load this LoRA beside the merged one with Apply LoRA or ComfyUI's Load LoRA.",
        )
    result = CanonicalLoRA(label, unknown=list(unknown), dtype=_common_dtype(lora.values()))
    strict = key_map is not None
    if not strict and looks_like_sdxl(useful):
        key_map, result.family = sdxl_key_map(), "sdxl"
        weight_shape = None
    for stem, keys in useful.items():
        target = find_target(stem, key_map) if key_map else None
        if target is None and strict:
            result.unknown += keys.values()
            continue
        if target is None:
            target = "name:" + bare(stem).removeprefix("lora_unet_").replace(".", "_")
        if target in result.stems:
            raise StyleLoomError(
                f"{label}: {stem} and {result.stems[target]} are for the same weight",
                "one adapter for each layer",
                "The file holds several adapters: save one of them alone.",
            )
        result.stems[target] = stem
        _take(result, target, stem, keys, tensors_of(lora, keys), weight_shape)
    if not result.adapters and not result.other:
        raise StyleLoomError(
            f"none of the {len(useful)} layers of {label} is in the model (first: {next(iter(useful))})",
            "a LoRA for this model",
            "Use the model that both LoRAs were made for.",
        )
    return result


def _take(result: CanonicalLoRA, target, stem: str, keys, parts, weight_shape: WeightShape | None) -> None:
    where = f"{result.label}: {stem}"
    for kind, own in kinds_of(parts, where):
        if kind.on_weight:
            shape = _known_shape(result, target, weight_shape)
            _refuse_enlarging(own, where, target, shape)
            result.adapters[target] = with_kernel(low_rank(own, where, kind), shape, where, target)
            own = {part: own[part] for part in own if part == "reshape_weight"}
            result.kinds[kind.name] = result.kinds.get(kind.name, 0) + 1
        elif kind is BIAS_CHANGE and isinstance(target, tuple):
            result.unknown += [keys[part] for part in own]  # the host has no place for a part of a bias
            continue
        else:
            result.kinds[kind.name] = result.kinds.get(kind.name, 0) + len(own)
        check_finite_parts(own, where)
        result.other |= {(target, part): value for part, value in own.items()}


def _known_shape(result: CanonicalLoRA, target, weight_shape: WeightShape | None) -> tuple[int | None, ...] | None:
    """Of the weight, None for sizes that are not known; None where nothing is."""
    key = target[0] if isinstance(target, tuple) else target
    if weight_shape is not None:
        return weight_shape(key)
    kernel = sdxl_kernels().get(key) if result.family == "sdxl" else None
    return None if kernel is None else (None, None, *kernel)


def _refuse_enlarging(parts, where: str, target, shape: tuple[int | None, ...] | None) -> None:
    """A control LoRA makes a layer wider: the host pads the model's weight with zeros first."""
    if "reshape_weight" not in parts or shape is None or None in shape:
        return
    due = tuple(int(number) for number in parts["reshape_weight"].flatten().tolist())
    if due != tuple(shape):
        raise StyleLoomError(
            f"{where} enlarges {target} from {list(shape)} to {list(due)}, as control LoRAs do for their picture",
            "LoRAs for layers of the model's own size",
            "A control LoRA cannot be merged. Load it beside the merged LoRA with Apply LoRA or ComfyUI's Load LoRA.",
        )


def with_kernel(adapter: LowRank, shape: tuple[int | None, ...] | None, where: str, target) -> LowRank:
    """The change with the kernel of the weight that it is for. The file may have a convolution as matrices, and a
    linear layer as a convolution over one pixel.

    Args:
        shape: of the weight, as far as it is known; None: the change comes back as it is.

    Raises:
        StyleLoomError: the change cannot be one of a weight with that kernel.
    """
    if shape is None or tuple(shape[2:]) == adapter.kernel:
        return adapter
    kernel = tuple(shape[2:])
    pixels, own = math.prod(kernel), math.prod(adapter.kernel)
    columns = adapter.shape[1]
    if (own == pixels == 1) or (not adapter.kernel and columns % pixels == 0):
        return dataclasses.replace(adapter, kernel=kernel)
    size = "x".join(map(str, adapter.kernel)) or f"one pixel, with {columns} columns"
    raise StyleLoomError(
        f"{where} is for a convolution over {size}, and {target} is "
        + (f"one over {'x'.join(map(str, kernel))}" if kernel else "a linear layer"),
        "a LoRA for this model",
        "Use the LoRA with the model that it was made for.",
    )
