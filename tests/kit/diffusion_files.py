"""What needs the host's own classes to be written: the small FLUX.2 as a file, and kohya's names for a model."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .lora_files import write_kohya_lora
from .seeded import save_whole


def write_flux2(path: str | os.PathLike, seed: int = 0, dtype: torch.dtype = torch.bfloat16, recipe: str = "") -> Path:
    """Writes `diffusion.flux2_small` with the names that the stock UNETLoader reads."""
    from . import diffusion  # only here: the other files of the kit are written without the host

    return save_whole(path, {k: v.to(dtype) for k, v in diffusion.flux2_state(seed).items()}, recipe)


def kohya_layers(patcher, contains: str = "attn") -> dict[str, tuple[int, int]]:
    """kohya's LoRA name → (in_features, out_features) for the Linear layers of a UNet whose name has `contains`."""
    import comfy.lora

    shapes = {k: tuple(v.shape) for k, v in patcher.model.state_dict().items()}
    layers = {}
    for name, key in comfy.lora.model_lora_keys_unet(patcher.model, {}).items():
        if name.startswith("lora_unet_") and isinstance(key, str) and contains in name:
            shape = shapes.get(key, ())
            if len(shape) == 2:
                layers.setdefault(key, (name, (shape[1], shape[0])))
    return dict(layers.values())


def write_attention_lora(path: str | os.PathLike, rank: int = 8, seed: int = 0, relative: float = 0.3,
                    recipe: str = "") -> Path:
    """Writes a LoRA on every attention of `diffusion.sdxl_small`, in kohya's naming, as SDXL's style LoRAs are."""
    from . import diffusion

    return write_kohya_lora(path, kohya_layers(diffusion.sdxl_small()), rank=rank, seed=seed, relative=relative,
                            recipe=recipe)
