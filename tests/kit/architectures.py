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


def make(name: str, seed: int = 0):
    """Returns new (MODEL, CLIP, VAE) objects of the architecture `name`."""
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    entry = ARCHITECTURES[name]
    # Nodes run in inference mode; weights made there could never be patched in place outside of it.
    with torch.inference_mode(False):
        return entry.model(seed), entry.clip(seed), LatentRGBVAE(entry.latent_format())
