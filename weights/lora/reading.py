"""A LoRA of any format in canonical form: low-rank changes by target weight."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import StyleLoomError
from .adapters import kind_of, low_rank
from .low_rank import LowRank
from .names import bare, find_target, key_part, sdxl_key_map

_ALONE = ("diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight")
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


def group_keys(lora: Mapping[str, torch.Tensor]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys of a LoRA by stem and part, and those that belong to no adapter."""
    stems: dict[str, dict[str, str]] = {}
    unknown = []
    for key in lora:
        found = key_part(key)
        if found is None:
            unknown.append(key)
            continue
        stem, part = found
        if part in stems.setdefault(stem, {}):
            raise StyleLoomError(
                f"{key} and {stems[stem][part]} are the same part of one adapter",
                "one adapter for each layer",
                "The file holds several adapters: save one of them alone.",
            )
        stems[stem][part] = key
    return stems, unknown


def _is_text(stem: str) -> bool:
    return stem.startswith(("lora_te", "text_encoder", "text_model", "te1.", "te2.")) or ".text_model." in stem


def looks_like_sdxl(stems) -> bool:
    """Whether the layers of the diffusion model that a LoRA names are those of SDXL."""
    unet = [stem for stem in stems if not _is_text(stem)]
    known = sum(find_target(stem, sdxl_key_map()) is not None for stem in unet)
    return known >= _SDXL_SHARE * max(1, len(unet)) if unet else any(stem.startswith("lora_te2") for stem in stems)


def _common_dtype(tensors) -> torch.dtype:
    dtype = None
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() > 1:
            found = torch.bfloat16 if tensor.element_size() == 1 else tensor.dtype
            dtype = found if dtype is None else torch.promote_types(dtype, found)
    return dtype or torch.float32


def _refuse_strange(label: str, stem: str, parts: Mapping[str, str]) -> None:
    for part, name in (("oft", "an OFT or BOFT"), ("a1.weight", "a GLoRA"), ("b1.weight", "a GLoRA")):
        if part in parts:
            raise StyleLoomError(
                f"{label}: {stem} is {name} adapter",
                "a LoRA, LoCon, LoHa or LoKr",
                "It multiplies the weights of the model instead of adding to them, so it cannot be merged as a LoRA. "
                "Load it beside the merged LoRA.",
            )


def read_lora(
    lora: Mapping[str, torch.Tensor], label: str, key_map: Mapping[str, Hashable] | None = None
) -> CanonicalLoRA:
    """Canonical form of a LoRA.

    Args:
        lora: LORA_MODEL, any format.
        label: for messages, e.g. "content_lora".
        key_map: names → targets of a model. None: SDXL's built-in one where the layers are SDXL's, else the file's own
            names, without what trainers put before them and with `_` for `.`.

    Returns:
        As float32 (float64 where the file is). With a key map, what is not in it stands in `unknown`.

    Raises:
        StyleLoomError: empty, no LoRA at all, DoRA, OFT, GLoRA, damaged, NaN; no layer of it in the key map.
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
    result = CanonicalLoRA(label, unknown=list(unknown), dtype=_common_dtype(lora.values()))
    strict = key_map is not None
    if not strict and looks_like_sdxl(useful):
        key_map, result.family = sdxl_key_map(), "sdxl"
    for stem, keys in useful.items():
        _refuse_strange(label, stem, keys)
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
        _take(result, target, stem, {part: lora[key] for part, key in keys.items()})
    if not result.adapters and not result.other:
        raise StyleLoomError(
            f"none of the {len(useful)} layers of {label} is in the model (first: {next(iter(useful))})",
            "a LoRA for this model",
            "Use the model that both LoRAs were made for.",
        )
    return result


def _take(result: CanonicalLoRA, target: Hashable, stem: str, parts: Mapping[str, torch.Tensor]) -> None:
    kind = kind_of(parts)
    if kind is not None:
        result.adapters[target] = low_rank(parts, f"{result.label}: {stem}")
        result.kinds[kind] = result.kinds.get(kind, 0) + 1
    for part in _ALONE:
        if part in parts:
            if not bool(parts[part].float().isfinite().all()):
                raise StyleLoomError(
                    f"{result.label}: {stem}.{part} holds NaN or infinity",
                    "finite numbers",
                    "The file is damaged: download it again.",
                )
            result.other[(target, part)] = parts[part]
            result.kinds["difference"] = result.kinds.get("difference", 0) + 1
