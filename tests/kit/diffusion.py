"""Seeded diffusion models of the true architectures at small width, as the host's own MODEL objects.

Layer counts, block numbers, key names and the conditioning path are the real ones; only widths are small. Each
function returns a new patcher, and two of one seed have the same weights bit by bit.
"""

from __future__ import annotations

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder

from .weights_fill import constant, fill, gain

Z_IMAGE_WIDTH, Z_IMAGE_MLP, Z_IMAGE_TEXT = 96, 256, 64


def _patcher(model: comfy.model_base.BaseModel) -> comfy.model_patcher.ModelPatcher:
    model.eval().requires_grad_(False)
    offload = comfy.model_management.unet_offload_device()
    model.to(offload)
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload)


def _config(cls: type, unet_config: dict):
    config = cls(unet_config)
    # float32 on every device: the models are small, and tests compare weights to 1e-5.
    config.set_inference_dtype(torch.float32, None)
    return config


def z_image_small(seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """Z-Image: 30 layers and 2 + 2 refiners with fused q, k, v, at width 96 (3840 in the real one), MLP 256."""
    config = _config(comfy.supported_models.ZImage, {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": Z_IMAGE_WIDTH,
        "cap_feat_dim": Z_IMAGE_TEXT, "n_layers": 30, "n_refiner_layers": 2, "qk_norm": True, "n_heads": 3,
        "n_kv_heads": 3, "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    })
    model = comfy.model_base.Lumina2(config)
    # The host writes 256 for the time vector here but min(width, 256) where the blocks read it: below width 256
    # the embedder has to be made again at the size that the blocks expect.
    model.diffusion_model.t_embedder = TimestepEmbedder(
        Z_IMAGE_WIDTH, output_size=Z_IMAGE_WIDTH, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    fill(model.diffusion_model, seed, (
        (r"adaLN_modulation\.\d\.bias$", constant(0.3)),
        (r"adaLN_modulation\.\d\.weight$", gain(0.3)),
        (r"pad_token$", constant(1.0)),
        (r"t_embedder\.mlp\.\d\.weight$", gain(1.4)),
    ))
    return _patcher(model)
