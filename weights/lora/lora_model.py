"""LORA_MODEL, the host's type for a LoRA on a wire, and the plain low-rank pairs of one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import StyleLoomError
from .low_rank import LowRank

# (suffix of the down factor, of the up factor), as diffusers and PEFT, DiffSynth, kohya and old diffusers spell them.
PAIR_SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
MODULE_PREFIXES = ("diffusion_model.", "transformer.")


class LoRAModel(dict):
    """A LORA_MODEL: the host's plain dict of tensors in LoRA-file keys, which also remembers its recipe.

    `metadata` holds strings for the header of a file, `source` is the name of the file that it was read from, if it
    was. Consumers that know nothing of them see a dict.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor] = (), metadata: Mapping[str, str] | None = None, source: str = ""
    ):
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.source = source


def to_lora_model(factors: Mapping[str, LowRank], metadata: Mapping[str, str] | None = None) -> LoRAModel:
    """Name factors as every host from 0.3.76 on reads them: `diffusion_model.{target}.lora_A.weight`, no alpha
    (so the scale is 1)."""
    tensors = {}
    for name, pair in factors.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = pair.up.contiguous()
    return LoRAModel(tensors, metadata)


def split_pairs(lora: Mapping[str, torch.Tensor]) -> tuple[dict[str, LowRank], list[str]]:
    """Read the plain low-rank pairs of a LoRA, `alpha / rank` multiplied into `up`.

    Args:
        lora: tensors in LoRA-file keys, any of `PAIR_SUFFIXES`, with or without `diffusion_model.` or `transformer.`.

    Returns:
        Low-rank changes by bare target name, and the keys that belong to no such pair (other adapter kinds, lone halves).

    Raises:
        StyleLoomError: the two halves of a pair disagree on the rank.
    """
    pairs: dict[str, LowRank] = {}
    used: set[str] = set()
    for key in lora:
        for down_suffix, up_suffix in PAIR_SUFFIXES:
            if not key.endswith(down_suffix):
                continue
            stem = key[: -len(down_suffix)]
            up_key = stem + up_suffix
            if up_key not in lora:
                continue
            down, up = lora[key], lora[up_key]
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                if down.ndim == up.ndim == 2:
                    raise StyleLoomError(
                        f"{key} is {list(down.shape)} and {up_key} is {list(up.shape)}",
                        "(rank, in) and (out, rank) with one rank",
                        "The LoRA file is damaged: export it again.",
                    )
                continue  # a convolution: not a plain pair
            alpha = lora.get(stem + ".alpha")
            if alpha is not None:
                up = up * (float(alpha) / down.shape[0])
                used.add(stem + ".alpha")
            name = next((stem[len(p) :] for p in MODULE_PREFIXES if stem.startswith(p)), stem)
            pairs[name] = LowRank(down, up)
            used |= {key, up_key}
    return pairs, [key for key in lora if key not in used]
