"""Seeded FLUX.1 and SD3.5-large with all of their blocks at small width, as the host's own MODEL objects."""

from __future__ import annotations

import comfy.model_base
import comfy.supported_models
import torch

from .diffusion import _config, _filled, _patcher
from .weights_fill import gain

FLUX1_WIDTH, FLUX1_TEXT, FLUX1_POOLED = 32, 24, 12
SD35_TEXT, SD35_POOLED = 24, 12


def flux1_small(seed: int = 0, **net):
    """FLUX.1: 19 two-stream and 38 one-stream blocks at width 32 (3072 in the real one), two heads of 16."""
    config = _config(comfy.supported_models.Flux, {
        "image_model": "flux", "axes_dim": [4, 6, 6], "num_heads": 2, "mlp_ratio": 2.0, "theta": 10000,
        "out_channels": 16, "qkv_bias": True, "in_channels": 16, "hidden_size": FLUX1_WIDTH,
        "context_in_dim": FLUX1_TEXT, "patch_size": 2, "vec_in_dim": FLUX1_POOLED, "depth": 19,
        "depth_single_blocks": 38, "guidance_embed": True, "txt_ids_dims": [],
        **net,
    })
    with torch.inference_mode(False):
        model = comfy.model_base.Flux(config)
        _filled(model, seed, ((r"\.(lin|proj|linear2|img_mlp\.2|txt_mlp\.2)\.weight$", gain(0.5)),))
        return _patcher(model)


def sd35_small(seed: int = 0, **net):
    """SD3.5-large: its 38 blocks at width 128 (2432 in the real one), two heads of 64."""
    config = _config(comfy.supported_models.SD3, {
        "in_channels": 16, "patch_size": 2, "depth": 2, "num_blocks": 38, "mlp_ratio": 1.0,
        "input_size": None, "pos_embed_max_size": 16, "num_patches": None, "adm_in_channels": SD35_POOLED,
        "qk_norm": "rms", "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": SD35_TEXT, "out_features": 128}}, **net,
    })
    with torch.inference_mode(False):
        model = comfy.model_base.SD3(config)
        _filled(model, seed, ((r"(adaLN_modulation\.1|attn\.proj|fc2)\.weight$", gain(0.5)),))
        return _patcher(model)
