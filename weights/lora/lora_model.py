"""LORA_MODEL, the host's type for a LoRA on a wire, and the plain low-rank pairs of one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .keys import group_keys, tensors_of
from .kinds import LORA
from .low_rank import LowRank

MODULE_PREFIXES = ("diffusion_model.", "transformer.")


class LoRAModel(dict):
    """A LORA_MODEL: the host's plain dict of tensors in LoRA-file keys, which also remembers its recipe.

    `metadata` holds strings for the header of a file, `source` is the name of the file that it was read from, if it
    was, and `renamed` says that the host finds no place for the keys as they are in that file. Consumers that know
    nothing of them see a dict.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] = (),
        metadata: Mapping[str, str] | None = None,
        source: str = "",
        renamed: bool = False,
    ):
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.source = source
        self.renamed = renamed


def to_lora_model(factors: Mapping[str, LowRank], metadata: Mapping[str, str] | None = None) -> LoRAModel:
    """Name factors as every host from 0.3.76 on reads them: `diffusion_model.{target}.lora_A.weight`, no alpha
    (so the scale is 1)."""
    tensors = {}
    for name, pair in factors.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = pair.up.contiguous()
    return LoRAModel(tensors, metadata)


def split_pairs(lora: Mapping[str, torch.Tensor]) -> tuple[dict[str, LowRank], list[str]]:
    """Read the plain low-rank pairs of a LoRA on linear layers, `alpha / rank` multiplied into `up`.

    Args:
        lora: tensors in LoRA-file keys, any spelling, with or without `diffusion_model.` or `transformer.`.

    Returns:
        Low-rank changes by bare target name, in the file's dtype, and the keys that belong to no such pair (other kinds
        of adapters, lone halves).

    Raises:
        StyleLoomError: the two halves of a pair disagree on the rank, or the file holds several adapters.
    """
    pairs: dict[str, LowRank] = {}
    stems, rest = group_keys(lora)
    for stem, keys in stems.items():
        parts = tensors_of(lora, keys)
        down, up = parts.get("down"), parts.get("up")
        if set(parts) - {"alpha"} != {"down", "up"} or down.ndim != 2 or up.ndim != 2:
            rest += keys.values()
            continue
        LORA.check(parts, stem)
        scale = LORA.scale(parts)
        name = next((stem[len(p) :] for p in MODULE_PREFIXES if stem.startswith(p)), stem)
        pairs[name] = LowRank(down, up if "alpha" not in parts else up * scale)
    return pairs, rest
