"""Every class of diffusion model that ComfyUI knows, at a tiny width with seeded weights, and what it is given.

Kinds of layers, their names and the way of the conditionings are the real ones; widths, depths and weights are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

TEXT = 8  # tokens of a prompt


@dataclasses.dataclass(frozen=True)
class Variant:
    """
    Attributes:
        name: For the table.
        config: The host's class in `comfy.supported_models`.
        net: The configuration of the net.
        latent: Shape of one latent, without the batch. A list of shapes: several latents, packed by the host.
        text: Width of the prompt's encoding.
        more: (generator) -> what else a conditioning carries: the same keys on both sides, other numbers.
        both: What stands in both conditionings alike.
        batch: Latents.
        build: (configuration) -> model, where the class wants more than its configuration.
        mask: A denoise mask is given: the first frame is kept.
        only: Which layers get a LoRA: a regular expression on their names.
    """

    name: str
    config: str
    net: dict
    latent: tuple
    text: int = 32
    more: Callable = lambda g: {}
    both: Callable = lambda g: {}
    batch: int = 1
    build: Callable | None = None
    mask: bool = False
    only: str = ""


def made(variant: Variant, seed: int = 0):
    """The variant's `BaseModel`, in float32."""
    import comfy.supported_models

    config = getattr(comfy.supported_models, variant.config)(dict(variant.net))
    config.unet_config.update(variant.net)  # the host's classes write some sizes out
    config.set_inference_dtype(torch.float32, None)
    model = variant.build(config) if variant.build else config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                value = noise / max(1, parameter[0].numel()) ** 0.5
            elif name.endswith(("weight", "scale", "gamma")):
                value = 1 + 0.05 * noise
            else:
                value = 0.05 * noise
            parameter.copy_(value.to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith(("pos_embed", "y_embedding", "inv_freq")):  # the host loads them
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.eval()


def conditioning(variant: Variant, seed: int) -> list:
    """CONDITIONING of one entry."""
    own, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    text = torch.randn(1, TEXT, variant.text, generator=own)
    return [[text, {**variant.more(own), **variant.both(shared)}]]


def normal(*shape) -> Callable:
    return lambda g: torch.randn(*shape, generator=g)


def pooled(width: int, **others) -> Callable:
    """A pooled encoding, and others by name: shapes."""
    return lambda g: {
        "pooled_output": torch.randn(1, width, generator=g),
        **{name: torch.randn(*shape, generator=g) for name, shape in others.items()},
    }


_UNET = {
    "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "in_channels": 4, "model_channels": 32, "use_temporal_attention": False, "use_temporal_resblock": False,
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "adm_in_channels": None,
    "use_linear_in_transformer": False, "context_dim": 32, "num_heads": 4,
}  # fmt: skip
_XL = {**_UNET, "model_channels": 64, "num_classes": "sequential", "use_linear_in_transformer": True, "num_head_channels": 16}
_XL.pop("num_heads")
_VIDEO = {**_XL, "use_temporal_attention": True, "use_temporal_resblock": True, "in_channels": 8}
_FLUX = {
    "image_model": "flux", "axes_dim": [4, 6, 6], "num_heads": 2, "mlp_ratio": 4.0, "theta": 10000, "hidden_size": 32,
    "context_in_dim": 32, "patch_size": 2, "depth": 2, "depth_single_blocks": 2, "qkv_bias": True, "txt_ids_dims": [],
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "guidance_embed": True,
}  # fmt: skip
_FLUX2 = {
    **_FLUX, "image_model": "flux2", "axes_dim": [4, 4, 4, 4], "mlp_ratio": 3.0, "theta": 2000, "in_channels": 128,
    "out_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
    "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3], "patch_size": 1, "vec_in_dim": None,
    "guidance_embed": False,
}  # fmt: skip
_CHROMA = {
    **{k: v for k, v in _FLUX.items() if k != "guidance_embed"}, "image_model": "chroma", "in_channels": 64,
    "out_channels": 64, "in_dim": 64, "out_dim": 32, "hidden_dim": 48, "n_layers": 2, "vec_in_dim": None,
}  # fmt: skip
_RADIANCE = {
    **_CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 4,
    "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 2, "nerf_max_freqs": 4, "nerf_tile_size": 512,
    "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, "use_x0": True,
    "use_sequential_txt_ids": False,
}  # fmt: skip
_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 32, "n_layers": 2,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [8, 12, 12],
    "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
}  # fmt: skip
_Z = {**_LUMINA, "rope_theta": 256.0, "ffn_dim_multiplier": 2.0, "z_image_modulation": True, "time_scale": 1000.0}
_QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
_OMNI = {
    "image_model": "omnigen2", "axes_dim_rope": [4, 6, 6], "axes_lens": [300, 512, 512], "hidden_size": 64,
    "in_channels": 16, "multiple_of": 16, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 2,
    "num_refiner_layers": 1, "patch_size": 2, "text_feat_dim": 32, "timestep_scale": 1000.0,
}  # fmt: skip
_PIXEL = {
    "image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 32, "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "patch_depth": 2, "pixel_depth": 2, "patch_size": 4,
    "txt_embed_dim": 32, "txt_max_length": 16,
}  # fmt: skip


def _z_build(config):
    """The host writes the width of the time vector out: below 256 the embedder has to be made again."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder

    model = config.get_model({}, "")
    width = min(config.unet_config["dim"], 256)
    if config.unet_config.get("z_image_modulation"):
        model.diffusion_model.t_embedder = TimestepEmbedder(
            width, output_size=width, dtype=torch.float32, operations=comfy.ops.disable_weight_init
        )
    return model


def _reference(channels: int, ndim: int = 4, count: int = 1, **others) -> Callable:
    size = (1, channels, 8, 8) if ndim == 4 else (1, channels, 1, 8, 8)
    return lambda g: {"reference_latents": [torch.randn(*size, generator=g) for _ in range(count)], **others}


def _words(g) -> dict:
    return {"attention_mask": torch.ones(1, TEXT, dtype=torch.long)}


def _zero123(config):
    import comfy.model_base

    return comfy.model_base.Stable_Zero123(
        config, cc_projection_weight=torch.zeros(32, 36), cc_projection_bias=torch.zeros(32)
    )


PICTURES = (
    Variant("SD1.5", "SD15", _UNET, (4, 8, 12)),
    Variant("SD1.5, four latents", "SD15", _UNET, (4, 8, 8), batch=4),
    Variant("SD2.1", "SD20", {**_UNET, "use_linear_in_transformer": True, "model_channels": 64}, (4, 8, 12)),
    Variant("SD1.5 instruct-pix2pix", "SD15_instructpix2pix", {**_UNET, "in_channels": 8}, (4, 8, 12)),
    Variant("SDXL", "SDXL", {**_XL, "adm_in_channels": 48 + 1536}, (4, 8, 12), more=pooled(48)),
    Variant("SDXL refiner", "SDXLRefiner", {**_XL, "adm_in_channels": 48 + 1280}, (4, 8, 12), more=pooled(48)),
    Variant("Stable Zero123", "Stable_Zero123", {**_UNET, "in_channels": 8}, (4, 8, 8), text=36, build=_zero123),
    Variant("SD x4 upscaler", "SD_X4Upscaler", {**_UNET, "in_channels": 7, "channel_mult": [1, 2, 2, 2],
            "num_res_blocks": [1] * 4, "transformer_depth": [0, 1, 1, 1], "transformer_depth_output": [1] * 8,
            "use_linear_in_transformer": True}, (4, 16, 16)),
    Variant("Stable Cascade C", "Stable_Cascade_C", {"stable_cascade_stage": "c", "c_hidden": [32, 32],
            "nhead": [2, 2], "c_cond": 32, "c_clip_text": 32, "c_clip_text_pooled": 32, "blocks": [[2, 2], [2, 2]]},
            (16, 8, 8), more=pooled(32)),
    Variant("Stable Cascade B", "Stable_Cascade_B", {"stable_cascade_stage": "b", "c_hidden": [16, 16, 32, 32],
            "nhead": [-1, -1, 2, 2], "c_cond": 32, "c_clip": 32, "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
            "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]]}, (4, 16, 16), more=pooled(32)),
    Variant("SD3", "SD3", {"in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None,
            "adm_in_channels": 24, "context_size": 32, "qk_norm": "rms", "pos_embed_max_size": 24, "num_patches": 576,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32,
            "out_features": 128}}, "pos_embed_scaling_factor": None}, (16, 8, 12), more=pooled(24)),
    Variant("AuraFlow", "AuraFlow", {"max_seq": 1024, "cond_seq_dim": 32, "n_double_layers": 1, "n_layers": 2,
            "dim": 64, "n_heads": 2, "global_conddim": 64}, (4, 8, 8)),
    Variant("PixArt alpha", "PixArtAlpha", {"image_model": "pixart_alpha", "num_heads": 2, "patch_size": 2,
            "hidden_size": 96, "in_channels": 4, "depth": 2, "caption_channels": 32, "input_size": 8,
            "pe_interpolation": 1, "micro_condition": True, "model_max_length": TEXT}, (4, 48, 48)),
    Variant("PixArt sigma", "PixArtSigma", {"image_model": "pixart_sigma", "num_heads": 2, "patch_size": 2,
            "hidden_size": 32, "in_channels": 4, "depth": 2, "caption_channels": 32, "input_size": 8,
            "pe_interpolation": 1, "micro_condition": False, "model_max_length": TEXT}, (4, 48, 48)),
    Variant("HunyuanDiT", "HunyuanDiT", {"image_model": "hydit", "depth": 4, "hidden_size": 64, "num_heads": 4,
            "text_states_dim": 32, "text_states_dim_t5": 24, "text_len": TEXT, "text_len_t5": TEXT}, (4, 8, 8),
            more=lambda g: {"conditioning_mt5xl": torch.randn(1, TEXT, 24, generator=g),
                            "attention_mask": torch.ones(1, TEXT), "attention_mask_mt5xl": torch.ones(1, TEXT)}),
    Variant("HunyuanDiT 1.1", "HunyuanDiT1", {"image_model": "hydit1", "depth": 4, "hidden_size": 64, "num_heads": 4,
            "text_states_dim": 32, "text_states_dim_t5": 24, "text_len": TEXT, "text_len_t5": TEXT, "size_cond": True,
            "use_style_cond": True}, (4, 8, 8),
            more=lambda g: {"conditioning_mt5xl": torch.randn(1, TEXT, 24, generator=g),
                            "attention_mask": torch.ones(1, TEXT), "attention_mask_mt5xl": torch.ones(1, TEXT)}),
    Variant("FLUX.1", "Flux", _FLUX, (16, 8, 12), more=pooled(24)),
    Variant("FLUX.1 Kontext", "Flux", _FLUX, (16, 8, 8), more=pooled(24), both=_reference(16)),
    Variant("FLUX.1 Fill", "FluxInpaint", {**_FLUX, "in_channels": 96}, (16, 8, 8), more=pooled(24)),
    Variant("FLUX.2", "Flux2", _FLUX2, (128, 4, 6)),
    Variant("FLUX.2, two references", "Flux2", _FLUX2, (128, 4, 6), both=_reference(128, count=2)),
    Variant("LongCat-Image", "LongCatImage", {**_FLUX, "vec_in_dim": None, "guidance_embed": False,
            "txt_ids_dims": [1, 2]}, (16, 8, 8)),
    Variant("Lens", "Lens", {"image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 2,
            "attention_head_dim": 16, "num_attention_heads": 2, "enc_hidden_dim": 16, "axes_dims_rope": (4, 6, 6),
            "multi_layer_encoder_feature": True, "selected_layer_index": (0, 1)}, (128, 4, 6)),
    Variant("Chroma", "Chroma", _CHROMA, (16, 8, 8)),
    Variant("Chroma Radiance", "ChromaRadiance", _RADIANCE, (3, 16, 16)),
    Variant("Lumina 2", "Lumina2", _LUMINA, (16, 8, 8)),
    Variant("Z-Image", "ZImage", {**_Z, "pad_tokens_multiple": 32}, (16, 8, 12), build=_z_build),
    Variant("Z-Image Omni, a reference", "ZImage", {**_Z, "pad_tokens_multiple": 32, "siglip_feat_dim": 16},
            (16, 8, 8), build=_z_build, both=_reference(16)),
    Variant("Z-Image, pixels", "ZImagePixelSpace", {**_Z, "image_model": "zimage_pixel", "patch_size": 4,
            "in_channels": 3, "decoder_in_channels": 48, "decoder_hidden_size": 32, "decoder_num_res_blocks": 2,
            "decoder_max_freqs": 4}, (3, 16, 16), build=_z_build),
    Variant("PixelDiT", "PixelDiTT2I", _PIXEL, (3, 16, 16)),
    Variant("PiD", "PiD", {**_PIXEL, "image_model": "pid", "lq_latent_channels": 16, "lq_hidden_dim": 16,
            "lq_num_res_blocks": 1, "sr_scale": 4, "latent_spatial_down_factor": 8}, (3, 32, 32),
            both=lambda g: {"lq_latent": torch.randn(1, 16, 1, 1, generator=g),
                            "degrade_sigma": torch.tensor([0.3])}),
    Variant("HiDream", "HiDream", {"image_model": "hidream", "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6],
            "caption_channels": [32, 32], "max_resolution": [16, 16], "in_channels": 16, "llama_layers": [0, 1, 1],
            "num_attention_heads": 2, "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 1,
            "num_single_layers": 1, "out_channels": 16, "patch_size": 2, "text_emb_dim": 24}, (16, 8, 8),
            more=pooled(24, conditioning_llama3=(1, 2, TEXT, 32))),
    Variant("Omnigen 2", "Omnigen2", _OMNI, (16, 8, 8), both=_words),
    Variant("Omnigen 2, a reference", "Omnigen2", _OMNI, (16, 8, 8),
            both=_reference(16, attention_mask=torch.ones(1, TEXT, dtype=torch.long))),
    Variant("Boogu, a reference", "Boogu", {**{k: v for k, v in _OMNI.items() if k != "text_feat_dim"},
            "image_model": "boogu", "instruction_feat_dim": 32, "num_double_stream_layers": 1}, (16, 8, 8),
            both=_reference(16, attention_mask=torch.ones(1, TEXT, dtype=torch.long))),
    Variant("Ideogram 4", "Ideogram4", {"image_model": "ideogram4", "in_channels": 128, "num_layers": 2,
            "num_attention_heads": 2, "attention_head_dim": 16, "intermediate_size": 48, "adaln_dim": 16,
            "llm_features_dim": 32, "mrope_section": [4, 2, 2]}, (128, 4, 6)),
    Variant("Krea 2", "Krea2", {"image_model": "krea2", "features": 64, "tdim": 16, "txtdim": 16, "heads": 4,
            "kvheads": 2, "layers": 2, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2, "patch": 2, "channels": 16},
            (16, 1, 8, 8)),
    Variant("Krea 2, a reference", "Krea2", {"image_model": "krea2", "features": 64, "tdim": 16, "txtdim": 16,
            "heads": 4, "kvheads": 2, "layers": 2, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2, "patch": 2,
            "channels": 16}, (16, 1, 8, 8), both=_reference(16, 5, reference_latents_method="index_timestep_zero")),
    Variant("Mage-Flow", "MageFlow", {**_QWEN, "image_model": "mage_flow", "in_channels": 128, "out_channels": 128},
            (128, 4, 6)),
    Variant("Qwen-Image", "QwenImage", _QWEN, (16, 1, 8, 12)),
    Variant("Qwen-Image-Edit 2511", "QwenImage", {**_QWEN, "default_ref_method": "index_timestep_zero"},
            (16, 1, 8, 8), both=_reference(16, 5)),
    Variant("JoyImage", "JoyImage", {"image_model": "joyimage", "hidden_size": 128, "num_attention_heads": 1,
            "text_dim": 32, "num_layers": 2}, (16, 1, 8, 8)),
    Variant("ERNIE-Image", "ErnieImage", {"image_model": "ernie", "hidden_size": 64, "num_attention_heads": 4,
            "num_layers": 2, "ffn_hidden_size": 96, "text_in_dim": 32, "rope_axes_dim": (4, 6, 6)}, (128, 4, 6)),
)  # fmt: skip
