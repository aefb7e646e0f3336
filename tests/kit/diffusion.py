"""Seeded diffusion models of the true architectures at small width, as the host's own MODEL objects.

Layer counts, block numbers, key names and the conditioning path are the real ones; only widths are small. Each
function returns a new patcher; on one machine two of one seed have the same weights bit by bit. `net` replaces entries
of the net's configuration: `architectures.SHORT` makes nets of few blocks with it.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder

from .noise_path import through_tokens, through_unet
from .weights_fill import constant, fill, gain

Z_IMAGE_WIDTH, Z_IMAGE_TEXT = 96, 64
QWEN_WIDTH, QWEN_TEXT = 32, 64
SDXL_CLIP_L, SDXL_CLIP_G = 32, 48
SD15_CLIP_L = 32
FLUX2_WIDTH, FLUX2_TEXT = 256, 192  # the text side hands over three layers of width 64 side by side


def _filled(model: comfy.model_base.BaseModel, seed: int, rules) -> torch.nn.Module:
    """Sets every weight of `model` and returns its inner net; what is kept are schedules, set by their classes."""
    fill(model, seed, rules, keep_buffers=lambda name: name.startswith(("model_sampling.", "noise_augmentor.")))
    return model.eval().diffusion_model


def _patcher(model: comfy.model_base.BaseModel) -> comfy.model_patcher.ModelPatcher:
    """Wraps the model as the host's loader does."""
    offload = comfy.model_management.unet_offload_device()
    model.to(offload)
    return comfy.model_patcher.CoreModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload)


def _config(cls: type, unet_config: dict):
    config = cls(unet_config)
    # float32 on every device: the models are small, and tests compare weights to 1e-5.
    config.set_inference_dtype(torch.float32, None)
    return config


def z_image_small(seed: int = 0, **net) -> comfy.model_patcher.ModelPatcher:
    """Z-Image: 30 layers and 2 + 2 refiners with fused q, k, v, at width 96 (3840 in the real one), MLP 256."""
    config = _config(comfy.supported_models.ZImage, {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": Z_IMAGE_WIDTH,
        "cap_feat_dim": Z_IMAGE_TEXT, "n_layers": 30, "n_refiner_layers": 2, "qk_norm": True, "n_heads": 3,
        "n_kv_heads": 3, "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
        "pad_tokens_multiple": 32, **net,
    })
    model = comfy.model_base.Lumina2(config)
    # The host writes 256 for the time vector here but min(width, 256) where the blocks read it: below width 256
    # the embedder has to be made again at the size that the blocks expect.
    model.diffusion_model.t_embedder = TimestepEmbedder(
        Z_IMAGE_WIDTH, output_size=Z_IMAGE_WIDTH, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    filled = _filled(model, seed, (
        (r"adaLN_modulation\.\d\.bias$", constant(0.02)),
        (r"adaLN_modulation\.\d\.weight$", gain(0.03)),
        (r"[qk]_norm\.weight$", constant(0.05, 1.3)),
        (r"pad_token$|x_embedder\.bias$", constant(1.0)),
        (r"t_embedder\.mlp\.\d\.weight$", gain(1.4)),
    ))
    # A negative share: the host takes this net's output negated.
    through_tokens(filled.x_embedder, filled.final_layer.linear, torch.eye(16).repeat(1, 4), -3.0, sizes=(0.12, 1.2))
    return _patcher(model)


def qwen_image_small(seed: int = 0, **net) -> comfy.model_patcher.ModelPatcher:
    """Qwen-Image: all 60 two-stream blocks at width 32 (3072 in the real one), two heads of 16."""
    config = _config(comfy.supported_models.QwenImage, {
        "image_model": "qwen_image", "in_channels": 64, "num_layers": 60, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": QWEN_TEXT, "axes_dims_rope": (4, 6, 6), **net,
    })
    model = comfy.model_base.QwenImage(config)
    filled = _filled(model, seed, (
        (r"_mod\.1\.bias$", constant(0.02)),
        (r"\.norm_(added_)?[qk]\.weight$", constant(0.05, 1.3)),
        (r"img_in\.bias$", constant(1.0)),
        # The modulations are LoRA targets, so they keep their full size; what they are given is small instead.
        (r"timestep_embedder\.linear_1\.weight$", gain(1.4)),
        (r"timestep_embedder\.linear_2\.weight$", gain(0.05)),
    ))
    # 32 numbers cannot carry a patch of 64: those that the eye sees go first.
    rgb = torch.tensor(comfy.latent_formats.Wan21.latent_rgb_factors).T
    uneven = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    through_tokens(filled.img_in, filled.proj_out, torch.eye(16).repeat_interleave(4, 1), 3.0, sizes=(0.4, 1.2),
                   then=torch.kron(rgb.contiguous(), uneven))
    return _patcher(model)


_UNET = {
    "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "in_channels": 4, "model_channels": 32, "use_temporal_attention": False, "use_temporal_resblock": False,
}
# A UNet's residual blocks and its transformers' output projections start at zero before training: half gain here,
# so that 70 attention layers add up to about the size of what they are added to.
_UNET_RULES = (
    # Text reaches a UNet here only: loud enough that a prompt, or a LoRA on these layers, is seen in the picture.
    (r"attn2\.(to_q|to_k)\.weight$", gain(1.6)),
    (r"attn2\.to_out\.0\.weight$", gain(2.5)),
    (r"(out_layers\.3|proj_out|to_out\.0|ff\.net\.2)\.weight$", gain(0.5)),
    (r"(time_embed|label_emb\.0)\.\d\.weight$", gain(1.4)),
)


def sdxl_small(seed: int = 0, **net) -> comfy.model_patcher.ModelPatcher:
    """SDXL: the real block structure with all 70 cross-attentions, at 32 base channels (320 in the real one)."""
    config = _config(comfy.supported_models.SDXL, {
        **_UNET, "num_classes": "sequential", "adm_in_channels": SDXL_CLIP_G + 6 * 256, "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
        "use_linear_in_transformer": True, "context_dim": SDXL_CLIP_L + SDXL_CLIP_G, "num_head_channels": 32,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], **net,
    })
    model = comfy.model_base.SDXL(config)
    through_unet(_filled(model, seed, _UNET_RULES), 4, 0.1)
    return _patcher(model)


def sd15_small(seed: int = 0, **net) -> comfy.model_patcher.ModelPatcher:
    """SD1.5: the real block structure with its 16 cross-attentions, at 32 base channels (320 in the real one)."""
    config = _config(comfy.supported_models.SD15, {
        **_UNET, "adm_in_channels": None, "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1,
        "use_linear_in_transformer": False, "context_dim": SD15_CLIP_L, "num_heads": 8,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], **net,
    })
    model = comfy.model_base.BaseModel(config)
    through_unet(_filled(model, seed, _UNET_RULES), 4, 0.1)
    return _patcher(model)


def flux2_small(seed: int = 0, **net) -> comfy.model_patcher.ModelPatcher:
    """FLUX.2: 2 two-stream and 4 one-stream blocks of two real heads (width 256), everything else as in klein."""
    config = _config(comfy.supported_models.Flux2, {
        "image_model": "flux2", "axes_dim": [32, 32, 32, 32], "num_heads": FLUX2_WIDTH // 128, "mlp_ratio": 3.0,
        "theta": 2000, "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False,
        "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3],
        "in_channels": 128, "hidden_size": FLUX2_WIDTH, "context_in_dim": FLUX2_TEXT, "patch_size": 1,
        "vec_in_dim": None, "depth": 2, "depth_single_blocks": 4, "guidance_embed": False, **net,
    })
    model = comfy.model_base.Flux2(config)
    filled = _filled(model, seed, (
        (r"modulation.*\.lin\.weight$", gain(0.6)),
        (r"time_in\..*\.weight$", gain(1.4)),
    ))
    through_tokens(filled.img_in, filled.final_layer.linear, torch.eye(32).repeat_interleave(4, 1), 1.5,
                   sizes=(0.8, 1.2))
    return _patcher(model)


def flux2_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """The same FLUX.2 as a state dict, with the names that the stock UNETLoader reads."""
    return flux2_small(seed).model.diffusion_model.state_dict()
