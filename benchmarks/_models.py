"""Diffusion models at their real layer widths with random weights, as ComfyUI's MODEL, and LoRAs for them.

On a GPU they have their real depth and the number of tokens of a picture of 1024 pixels. On a CPU a step of those would
take minutes: there they have few blocks and few tokens. Widths, heads and names are the published ones everywhere.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a model is built and what it is given.

    Attributes:
        latent: Channels, height and width of the latent.
        text: Tokens and width of the prompt's encoding.
        pooled: Width of the pooled encoding, or None.
        targets: Which of ComfyUI's LoRA names take a LoRA: attention and feed-forward.
        build: () → the model, without values.
    """

    latent: tuple[int, int, int]
    text: tuple[int, int]
    pooled: int | None
    targets: str
    build: Callable


def spec(name: str, real: bool) -> Spec:
    """The model `name` at its real depth and tokens, or reduced."""
    return {"sdxl": _sdxl, "flux2": _flux2, "z-image": _z_image}[name](real)


def _config(cls, unet_config: dict, dtype: torch.dtype):
    config = cls(unet_config)
    config.set_inference_dtype(dtype, None)
    return config


def _sdxl(real: bool) -> Spec:
    """Reduced: 1 and 2 transformer blocks where SDXL has 2 and 10, one residual block instead of two, and none where
    it goes down with 320 channels and without attention."""
    depth = (
        {"channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10]}
        | {"transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
        if real
        else {"channel_mult": [1, 2, 4], "num_res_blocks": [0, 1, 1], "transformer_depth": [1, 2]}
        | {"transformer_depth_middle": 2, "transformer_depth_output": [0, 1, 1, 2, 2]}
    )

    def build(dtype):
        import comfy.model_base
        import comfy.supported_models

        fixed = {
            "use_checkpoint": False,
            "image_size": 32,
            "out_channels": 4,
            "use_spatial_transformer": True,
            "legacy": False,
            "in_channels": 4,
            "model_channels": 320,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "use_linear_in_transformer": True,
            "context_dim": 2048,
            "num_head_channels": 64,
        }
        return comfy.model_base.SDXL(_config(comfy.supported_models.SDXL, fixed | depth, dtype))

    side = 128 if real else 24
    targets = r"diffusion_model\..*(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
    return Spec((4, side, side), (77, 2048), 1280, targets, build)


def _flux2(real: bool) -> Spec:
    """klein 4B. Reduced: one block of each kind instead of 5 and 20, and the text is not filled up to 512 tokens."""

    def build(dtype):
        import comfy.model_base
        import comfy.supported_models

        config = {
            "image_model": "flux2",
            "axes_dim": [32, 32, 32, 32],
            "num_heads": 24,
            "mlp_ratio": 3.0,
            "theta": 2000,
            "out_channels": 128,
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "txt_ids_dims": [3],
            "in_channels": 128,
            "hidden_size": 3072,
            "context_in_dim": 7680,
            "patch_size": 1,
            "vec_in_dim": None,
            "depth": 5 if real else 1,
            "depth_single_blocks": 20 if real else 1,
            "guidance_embed": False,
        }
        # The class for FLUX.2 adds to that for FLUX nothing but the filling up of the text.
        cls = comfy.model_base.Flux2 if real else comfy.model_base.Flux
        return cls(_config(comfy.supported_models.Flux2, config, dtype))

    side = 64 if real else 8
    targets = (
        r"transformer\.(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out))|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))"
    )
    return Spec((128, side, side), (512 if real else 32, 7680), None, targets, build)


def _z_image(real: bool) -> Spec:
    """Reduced: one of the 30 layers, and none of the refiners, which are like it."""

    def build(dtype):
        import comfy.model_base
        import comfy.supported_models

        config = {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 3840,
            "cap_feat_dim": 2560,
            "n_layers": 30 if real else 1,
            "n_refiner_layers": 2 if real else 0,
            "qk_norm": True,
            "n_heads": 30,
            "n_kv_heads": 30,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }
        return comfy.model_base.Lumina2(_config(comfy.supported_models.ZImage, config, dtype))

    side = 128 if real else 16
    targets = r"transformer\.\w+\.\d+\.(attention\.to_([qkv]|out\.0)|feed_forward\.w[123])"
    return Spec((16, side, side), (64 if real else 32, 2560), None, targets, build)


def patcher(made: Spec, dtype: torch.dtype):
    """MODEL with random weights of a trained model's size: gain 1, norms at 1, biases at 0."""
    import comfy.model_management
    import comfy.model_patcher

    model = made.build(dtype)
    offload = comfy.model_management.unet_offload_device()
    model.to(offload)
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(offload)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)
                continue
            flat, size = parameter.view(-1), math.prod(parameter.shape[1:]) ** -0.5
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                part.copy_(block[: part.numel()]).mul_(size)
    return comfy.model_patcher.CoreModelPatcher(
        model.eval(), load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )


def lora(made: Spec, model, rank: int, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """LORA_MODEL of this rank on every target; its change is about a tenth of the weight."""
    import comfy.lora
    import comfy.utils

    draw = torch.Generator().manual_seed(seed)
    state, due = {}, re.compile(made.targets)
    for name, target in sorted(comfy.lora.model_lora_keys_unet(model.model, {}).items()):
        if not due.fullmatch(name):
            continue
        key, part = target if isinstance(target, tuple) else (target, None)
        out, inside = comfy.utils.get_attr(model.model, key).shape
        out = out if part is None else part[2]
        state[f"{name}.lora_down.weight"] = (torch.randn(rank, inside, generator=draw) * inside**-0.5).to(dtype)
        state[f"{name}.lora_up.weight"] = (torch.randn(out, rank, generator=draw) * 0.1 * rank**-0.5).to(dtype)
        state[f"{name}.alpha"] = torch.tensor(float(rank), dtype=dtype)
    return state


def conditioning(made: Spec, seed: int) -> list:
    """CONDITIONING with a random encoding."""
    draw = torch.Generator().manual_seed(seed)
    pooled = {} if made.pooled is None else {"pooled_output": torch.randn(1, made.pooled, generator=draw)}
    return [[torch.randn(1, *made.text, generator=draw), pooled]]
