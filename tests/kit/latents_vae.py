"""A VAE without weights: the latent format's own RGB factors one way, their pseudo-inverse the other way.

The host shows the same linear map as its live preview. It is honest (nothing is learned), deterministic, and works
with every node that takes a VAE.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
import torch.nn.functional as F

PIXELS = 8  # per side of one RGB cell: every format here is 8 pixels wide after its own reshape


class LatentRGB(torch.nn.Module):
    """decode: latent (B, C, [T,] h, w) → RGB in -1..1 (B, 3, [T',] H, W); encode: the way back.

    In between lies the model's own latent space (after `process_in`), where the factors are defined.
    """

    def __init__(self, latent_format: comfy.latent_formats.LatentFormat):
        super().__init__()
        factors = torch.tensor(latent_format.latent_rgb_factors, dtype=torch.float32)  # (channels, 3)
        bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0], dtype=torch.float32)
        self.format = latent_format
        self.video = latent_format.latent_dimensions == 3
        self.packed = latent_format.latent_rgb_factors_reshape is not None
        # As parameters, so that the host moves them and counts them like any other VAE's weights.
        self.factors = torch.nn.Parameter(factors, requires_grad=False)
        self.inverse = torch.nn.Parameter(torch.linalg.pinv(factors.double()).float(), requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def decode(self, latent: torch.Tensor, **_options) -> torch.Tensor:
        frames = latent.shape[2] if latent.ndim == 5 else None
        x = self.format.process_in(latent)
        if frames is not None:  # each frame is a picture of its own
            x = x.movedim(2, 1).flatten(0, 1)
        if self.packed:
            x = self.format.latent_rgb_factors_reshape(x)
        rgb = torch.einsum("bchw,cr->brhw", x, self.factors) + self.bias[:, None, None]
        rgb = F.interpolate(rgb, scale_factor=PIXELS, mode="bilinear", align_corners=False)
        if frames is not None:
            rgb = rgb.unflatten(0, (latent.shape[0], frames)).movedim(1, 2)
            # The real video VAE gives one picture for the first latent frame and four for each further one.
            repeats = torch.tensor([1] + [4] * (frames - 1), device=rgb.device)
            rgb = rgb.repeat_interleave(repeats, dim=2)
        return rgb

    def encode(self, pixels: torch.Tensor, **_options) -> torch.Tensor:
        batch, frames = pixels.shape[0], None
        if self.video:
            first, rest = pixels[:, :, :1], pixels[:, :, 1:]
            rest = rest[:, :, : rest.shape[2] // 4 * 4].unflatten(2, (-1, 4)).mean(3)
            pixels = torch.cat((first, rest), dim=2)
            frames = pixels.shape[2]
            pixels = pixels.movedim(2, 1).flatten(0, 1)
        rgb = F.avg_pool2d(pixels, PIXELS) - self.bias[:, None, None]
        x = torch.einsum("brhw,rc->bchw", rgb, self.inverse)
        if self.packed:  # the way back of the format's reshape: 2 × 2 cells go into channels
            x = F.pixel_unshuffle(x, 2)
        if frames is not None:
            x = x.unflatten(0, (batch, frames)).movedim(1, 2)
        return self.format.process_out(x)


class LatentRGBVAE(comfy.sd.VAE):
    """The host's VAE object around `LatentRGB`; made from its pixel-space VAE so that every attribute is set."""

    def __init__(self, latent_format: comfy.latent_formats.LatentFormat):
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
        self.first_stage_model = LatentRGB(latent_format).eval()
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.first_stage_model, load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device())
        self.disable_offload = False
        self.latent_channels = latent_format.latent_channels
        self.latent_dim = latent_format.latent_dimensions
        ratio = 2 * PIXELS if self.first_stage_model.packed else PIXELS
        if self.first_stage_model.video:
            self.upscale_ratio = (lambda frames: max(0, frames * 4 - 3), ratio, ratio)
            self.upscale_index_formula = (4, ratio, ratio)
            self.downscale_ratio = (lambda frames: max(0, (frames + 3) // 4), ratio, ratio)
            self.downscale_index_formula = (4, ratio, ratio)
        else:
            self.upscale_ratio = self.downscale_ratio = ratio
        # A handful of float copies of the picture; the shapes are (B, C, [T,] h, w) in both functions.
        self.memory_used_encode = lambda shape, dtype: 16 * shape[-1] * shape[-2] * 4
        self.memory_used_decode = lambda shape, dtype: 64 * shape[-1] * shape[-2] * ratio * ratio
        self.size = None
        self.model_size()
