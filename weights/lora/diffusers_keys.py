"""LoRAs of a UNet in diffusers' own dotted names, put into kohya's, which every reader knows.

diffusers has saved them as `unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_k.lora.down.weight`, without
the `.processor` that its older files have before `to_k` (B-LoRA's files are of this kind), and under PEFT as
`….to_k.lora_A.weight`. The host looks for `lora_unet_up_blocks_0_attentions_1_…_to_k` and for the older form alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..unet.architecture import transformer_of
from .keys import key_part
from .names import bare


def kohya_names(lora: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in the same order, each key of this kind with another stem.

    A key stays as it is where the new one is there already: two adapters for one layer are no business of a renaming.
    """
    made: dict[str, torch.Tensor] = {}
    for key, value in lora.items():
        stem = (key_part(key) or ("",))[0] if isinstance(key, str) else ""
        new = _kohya(stem) + key[len(stem) :] if stem.startswith("unet.") else key
        made[key if new in lora or new in made else new] = value
    return made


def _kohya(stem: str) -> str:
    """`lora_unet_…` for a layer of a transformer of a UNet in dotted diffusers' names; anything else as it is."""
    name = bare(stem)
    if not name.startswith(("down_blocks.", "mid_block.", "up_blocks.")) or transformer_of(name) is None:
        return stem
    name = name.replace(".processor.", ".")
    if name.endswith(".to_out"):
        name += ".0"
    return "lora_unet_" + name.replace(".", "_")
