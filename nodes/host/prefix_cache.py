"""The prefix cache of Qwen-Image-2.1: keys and values of prompt and references, kept from the first step on.

It is kept by what the model is given, and asks nothing about LoRAs: a strength that changes from step to step would
stay that of the first step there, and where both sides have the same prompt, the second would look at the first one's
keys.
"""

from __future__ import annotations

import torch

OPTION = "qwen_image21_cache"  # of ComfyUI's own node QwenImage21Cache


def without_prefix_cache(diffusion_model: torch.nn.Module) -> dict[str, dict]:
    """What `transformer_options` needs so that the model computes the prefix in every step; {} for all other models."""
    return {OPTION: {"device": "off"}} if hasattr(diffusion_model, "reset_prefix_cache") else {}
