"""A seeded CLIP_VISION at small width with the host's real preprocessing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import comfy.clip_vision
import torch

from .weights_fill import constant, fill, gain


def clip_vision_small(seed: int = 0, projection: int = 32) -> comfy.clip_vision.ClipVisionModel:
    """A CLIP vision tower: 224 pixels, patch 14, so 257 tokens as in ViT-H; width 64, four layers."""
    config = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "hidden_act": "gelu", "image_size": 224, "patch_size": 14, "num_channels": 3,
        "projection_dim": projection,
    }
    with tempfile.TemporaryDirectory() as folder:  # the oldest hosts read the configuration from a file only
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        vision = comfy.clip_vision.ClipVisionModel(str(path))
    vision.dtype = torch.float32  # the host's choice depends on the machine; the seeded values should not
    vision.model.to(torch.float32)
    fill(vision.model, seed, (
        (r"position_embedding\.weight$", constant(0.1)),
        (r"class_embedding$", constant(0.3)),
        (r"patch_embedding\.weight$", gain(4.0)),
        (r"(q_proj|k_proj)\.weight$", gain(1.6)),
    ))
    return vision
