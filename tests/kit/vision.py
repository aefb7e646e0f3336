"""A seeded CLIP_VISION at small width with the host's real preprocessing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import comfy.clip_vision
import torch

from .seeded import normal
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


def siglip_small(seed: int = 0, width: int = 144) -> comfy.clip_vision.ClipVisionModel:
    """SigLIP: heads of 72 as in so400m, patch 14, but 56 pixels (384 in the real one), so 16 tokens; two layers."""
    vision = comfy.clip_vision.ClipVisionModel({
        "model_type": "siglip_vision_model", "hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": width // 72, "hidden_act": "gelu_pytorch_tanh", "image_size": 56, "patch_size": 14,
        "num_channels": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    })
    vision.dtype = torch.float32
    vision.model.to(torch.float32)
    fill(vision.model, seed, ((r"position_embedding\.weight$", constant(0.1)), (r"patch_embedding\.weight$", gain(4.0))))
    return vision


def siglip_head(seed: int = 0, width: int = 144, wide: int = 96) -> dict[str, torch.Tensor]:
    """The pooling head that belongs to it, under the names of the published file."""
    shapes = {"probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width),
              "attention.in_proj_bias": (3 * width,), "attention.out_proj.weight": (width, width),
              "attention.out_proj.bias": (width,), "layernorm.weight": (width,), "layernorm.bias": (width,),
              "mlp.fc1.weight": (wide, width), "mlp.fc1.bias": (wide,), "mlp.fc2.weight": (width, wide),
              "mlp.fc2.bias": (width,)}
    return {f"vision_model.head.{key}": normal(seed, key, shape, shape[-1] ** -0.5 if len(shape) > 1 else 0.1,
                                               1.0 if key == "layernorm.weight" else 0.0)
            for key, shape in shapes.items()}
