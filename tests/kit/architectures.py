"""The five architectures by name: diffusion model, text side and VAE of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.latent_formats
import torch

from . import diffusion, text
from .latents_vae import LatentRGBVAE


@dataclass(frozen=True)
class Architecture:
    model: Callable
    clip: Callable
    latent_format: type


ARCHITECTURES = {
    "z-image": Architecture(diffusion.z_image_small, text.z_image_text, comfy.latent_formats.Flux),
    "qwen-image": Architecture(diffusion.qwen_image_small, text.qwen_image_text, comfy.latent_formats.Wan21),
    "sdxl": Architecture(diffusion.sdxl_small, text.sdxl_text, comfy.latent_formats.SDXL),
    "sd1.5": Architecture(diffusion.sd15_small, text.sd15_text, comfy.latent_formats.SD15),
    "flux2": Architecture(diffusion.flux2_small, text.flux2_text, comfy.latent_formats.Flux2),
}


# The same nets with few blocks (FLUX.2 also at a smaller width): for tests that ask nothing of the number of blocks.
# A call of a net this small costs by the number of its layers, not by their widths.
_SHORT_UNET = {"num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth_middle": 1}
SHORT = {
    "z-image": {"n_layers": 3, "n_refiner_layers": 1},
    "qwen-image": {"num_layers": 3},
    "sdxl": {**_SHORT_UNET, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2]},
    "sd1.5": {**_SHORT_UNET, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]},
    # As wide as a patch, so that all of the patch is carried: narrower, what is left out drowns in bfloat16's rounding.
    "flux2": {"hidden_size": 128, "num_heads": 2, "axes_dim": [16, 16, 16, 16], "depth": 1, "depth_single_blocks": 2},
}


def make_model(name: str, seed: int = 0, short: bool = False):
    """A new MODEL alone, of the true depth or with few blocks."""
    with torch.inference_mode(False):
        return ARCHITECTURES[name].model(seed, **(SHORT[name] if short else {}))


def make(name: str, seed: int = 0):
    """Returns new (MODEL, CLIP, VAE) objects of the architecture `name`."""
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    entry = ARCHITECTURES[name]
    # Nodes run in inference mode; weights made there could never be patched in place outside of it.
    with torch.inference_mode(False):
        return entry.model(seed), entry.clip(seed), LatentRGBVAE(entry.latent_format())
