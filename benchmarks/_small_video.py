"""The classes for video, sound and shapes; see `_small_models.py`."""

from __future__ import annotations

import torch
from _small_models import _VIDEO, TEXT, Variant, pooled

_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 24,
    "axes_dim": [4, 6, 6], "meanflow": False, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "byt5": False,
    "guidance_embed": True, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 32, "out_dim": 16, "num_heads": 2, "ffn_dim": 48,
    "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 16, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": 32, "text_len": TEXT,
}  # fmt: skip
_COSMOS = {
    "image_model": "cosmos", "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 32, "block_config": "FA-CA-MLP",
    "concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 8, "num_blocks": 2,
    "num_heads": 2, "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
    "crossattn_emb_channels": 32,
}  # fmt: skip
_PREDICT2 = {
    **{k: v for k, v in _COSMOS.items() if k not in ("block_config", "block_x_format", "affline_emb_norm",
                                                     "extra_per_block_abs_pos_emb_type")},
    "image_model": "cosmos_predict2", "pos_emb_learnable": True, "min_fps": 1, "max_fps": 30,
    "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False,
}  # fmt: skip
_LTX = {
    "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "cross_attention_dim": 32, "caption_channels": 32, "in_channels": 128,
}  # fmt: skip
_COG = {
    "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 16,
    "num_layers": 2, "in_channels": 16, "patch_size": 2, "text_embed_dim": 32, "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": False,
}  # fmt: skip
_STABLE_AUDIO = {
    "audio_model": "dit1.0", "io_channels": 64, "embed_dim": 128, "depth": 2, "num_heads": 2,
    "cond_token_dim": 768, "global_cond_dim": 1536, "project_cond_tokens": True, "timestep_features_type": "learned",
    "input_concat_dim": 0,
}  # fmt: skip


def _stable_audio(config):
    import comfy.ldm.audio.embedders
    import comfy.model_base

    seconds = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=512).state_dict()
    return comfy.model_base.StableAudio1(config, seconds, seconds)


def _video(channels: int = 16, **sizes):
    """Latents of a video by name: channels, or whole shapes."""
    return lambda g: {
        name: torch.randn(*((1, size, 3, 8, 8) if isinstance(size, int) else size), generator=g)
        for name, size in sizes.items()
    }


def _wan(name: str, config: str, latent=(16, 3, 8, 8), more=lambda g: {}, both=lambda g: {}, mask=False, **net):
    return Variant(name, config, {**_WAN, **net}, latent, more=more, both=both, mask=mask)


def _mask(g):
    return {"attention_mask": torch.ones(1, TEXT, dtype=torch.long)}


class _Vision:
    """What a CLIP vision model gives."""

    def __init__(self, tensor):
        self.penultimate_hidden_states = self.last_hidden_state = self.image_embeds = tensor


def _vision(tokens: int = 257, width: int = 1280, name: str = "clip_vision_output"):
    return lambda g: {name: _Vision(torch.randn(1, tokens, width, generator=g))}


OTHERS = (
    Variant("Stable Video Diffusion", "SVD_img2vid", {**_VIDEO, "adm_in_channels": 768,
            "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images",
            "merge_factor": 0.0, "video_kernel_size": [3, 1, 1]}, (4, 8, 8), batch=3),
    Variant("Mochi", "GenmoMochi", {"image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2,
            "hidden_size_x": 32, "hidden_size_y": 16, "mlp_ratio_x": 384.0, "mlp_ratio_y": 2.0, "learn_sigma": False,
            "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True, "patch_embed_bias": True,
            "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
            "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 32, "t5_token_length": TEXT,
            "rope_theta": 10000.0}, (12, 3, 8, 8), both=_mask),
    Variant("LTX-Video", "LTXV", _LTX, (128, 3, 4, 4), both=_mask),
    Variant("LTX-Video, first frame kept", "LTXV", _LTX, (128, 3, 4, 4), mask=True, both=_mask),
    Variant("MiniMax-H3", "MiniMaxH3", {"image_model": "minimax_h3", "num_layers": 1, "token_refiner_num_layers": 1,
            "hidden_size": 96, "num_attention_heads": 1, "attention_head_dim": 96, "ffn_hidden_size": 48,
            "text_dim": 32, "timestep_input_dim": 16, "time_embed_hidden_size": 24, "time_embed_dim": 16},
            [(24, 2, 4, 4), (32, 1, 6)]),
    Variant("HunyuanVideo", "HunyuanVideo", _HUNYUAN, (16, 3, 8, 8), more=pooled(24)),
    Variant("HunyuanVideo I2V, guiding frame", "HunyuanVideoI2V", {**_HUNYUAN, "in_channels": 33}, (16, 3, 8, 8),
            more=pooled(24), both=lambda g: {"guiding_frame_index": 0}),
    Variant("HunyuanImage 2.1", "HunyuanImage21", {**_HUNYUAN, "in_channels": 64, "out_channels": 64,
            "patch_size": [1, 1], "axes_dim": [8, 8], "vec_in_dim": None, "meanflow": True}, (64, 8, 8)),
    Variant("HunyuanVideo 1.5", "HunyuanVideo15", {**_HUNYUAN, "in_channels": 65, "out_channels": 32,
            "patch_size": [1, 1, 1], "vec_in_dim": None, "vision_in_dim": 24, "use_cond_type_embedding": True,
            "meanflow_sum": True, "guidance_embed": False}, (32, 3, 4, 4), more=pooled(24), both=_vision(6, 24)),
    Variant("Cosmos 1", "CosmosT2V", _COSMOS, (16, 3, 8, 8)),
    Variant("Cosmos 1, as many frames as rows", "CosmosT2V", _COSMOS, (16, 2, 8, 8)),
    Variant("Cosmos 1, as many frames as rows, blocks", "CosmosT2V", _COSMOS, (16, 2, 8, 8), only=r"attn|block\.layer"),
    Variant("Cosmos Predict2", "CosmosT2IPredict2", _PREDICT2, (16, 1, 8, 8)),
    Variant("Cosmos Predict2 video", "CosmosI2VPredict2", {**_PREDICT2, "in_channels": 17}, (16, 3, 8, 8), mask=True),
    Variant("Anima", "Anima", {**_PREDICT2, "image_model": "anima", "crossattn_emb_channels": 1024}, (16, 1, 8, 8),
            text=1024, more=lambda g: {"t5xxl_ids": torch.randint(0, 32000, (5,), generator=g),
                                       "t5xxl_weights": torch.ones(5)}),
    Variant("CogVideoX", "CogVideoX_T2V", _COG, (16, 3, 8, 8)),
    Variant("CogVideoX 1.5 I2V", "CogVideoX_I2V", {**_COG, "in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 16},
            (16, 4, 8, 8)),
    Variant("Kandinsky 5", "Kandinsky5", {"image_model": "kandinsky5", "model_dim": 32, "axes_dims": (4, 6, 6),
            "time_dim": 16, "ff_dim": 48, "visual_embed_dim": 132, "num_text_blocks": 1, "num_visual_blocks": 2,
            "in_text_dim": 32, "in_text_dim2": 24}, (16, 3, 8, 8), more=pooled(24)),
    _wan("Wan 2.1", "WAN21_T2V"),
    _wan("Wan 2.1, as many frames as rows", "WAN21_T2V", (16, 2, 8, 8)),
    _wan("Wan 2.1 I2V", "WAN21_I2V", model_type="i2v", in_dim=36, both=_vision()),
    _wan("Wan 2.1 Fun Control", "WAN21_FunControl2V", model_type="i2v", in_dim=48, both=_vision()),
    _wan("Wan 2.1 Camera", "WAN21_Camera", model_type="camera", in_dim=36, in_dim_control_adapter=24,
         both=lambda g: {**_vision()(g), **_video(camera_conditions=(1, 24, 3, 64, 64))(g)}),
    _wan("Wan 2.1 VACE", "WAN21_Vace", model_type="vace", vace_in_dim=96, vace_layers=2,
         both=lambda g: {"vace_frames": [torch.randn(1, 32, 3, 8, 8, generator=g)]}),
    _wan("Wan 2.1 VACE, two contexts", "WAN21_Vace", model_type="vace", vace_in_dim=96, vace_layers=2,
         both=lambda g: {"vace_frames": [torch.randn(1, 32, 3, 8, 8, generator=g) for _ in range(2)],
                         "vace_strength": [1.0, 0.7]}),
    _wan("Wan 2.1 HuMo", "WAN21_HuMo", model_type="humo", in_dim=36, audio_token_num=16,
         both=_video(audio_embed=(1, 3, 8, 5, 1280))),
    _wan("Wan 2.1 SCAIL", "WAN21_SCAIL", model_type="scail", in_dim=20,
         both=lambda g: {**_video(pose_video_latent=(1, 16, 3, 4, 4))(g),
                         "reference_latents": [torch.randn(1, 16, 1, 8, 8, generator=g)]}),
    _wan("Wan 2.1 FlowRVS", "WAN21_FlowRVS"),
    _wan("Wan 2.1 causal", "WAN21_CausalAR_T2V"),
    _wan("Wan 2.2 5B", "WAN22_T2V", (48, 3, 8, 8), in_dim=48, out_dim=48),
    _wan("Wan 2.2 5B, first frame kept", "WAN22_T2V", (48, 3, 8, 8), in_dim=48, out_dim=48, mask=True),
    _wan("Wan 2.2 S2V", "WAN22_S2V", model_type="s2v", num_layers=5, audio_dim=16, cond_dim=16,
         audio_inject_layers=[0, 4],
         both=lambda g: {"audio_embed": torch.randn(1, 25, 16, 12, generator=g),
                         "reference_latents": [torch.randn(1, 16, 1, 8, 8, generator=g)],
                         "control_video": torch.randn(1, 16, 3, 8, 8, generator=g)}),
    _wan("Wan 2.2 Animate", "WAN22_Animate", model_type="animate", in_dim=36, motion_encoder_dim=512,
         both=lambda g: {**_vision()(g), "pose_video_latent": torch.randn(1, 16, 2, 8, 8, generator=g)}),
    _wan("Wan 2.2 WanDancer", "WAN22_WanDancer", model_type="wandancer", in_dim=36, audio_inject_layers=[0],
         music_dim=16, music_heads=2, music_latent_dim=16, both=_vision()),
    Variant("Hunyuan3D 2", "Hunyuan3Dv2", {"image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 32,
            "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
            "qkv_bias": True, "guidance_embed": False}, (64, 24)),
    Variant("Hunyuan3D 2.1", "Hunyuan3Dv2_1", {"image_model": "hunyuan3d2_1", "in_channels": 64, "context_dim": 32,
            "hidden_size": 32, "num_heads": 2, "depth": 4, "qkv_bias": False, "guidance_cond_proj_dim": None,
            "num_moe_layers": 2, "num_experts": 4}, (64, 24)),
    Variant("Hunyuan3D 2.1, attention only", "Hunyuan3Dv2_1", {"image_model": "hunyuan3d2_1", "in_channels": 64,
            "context_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 4, "qkv_bias": False,
            "guidance_cond_proj_dim": None, "num_moe_layers": 2, "num_experts": 4}, (64, 24), only=r"attn"),
    Variant("ACE-Step", "ACEStep", {"audio_model": "ace", "attention_head_dim": 16, "in_channels": 8, "inner_dim": 32,
            "max_height": 16, "max_position": 4096, "max_width": 4096, "mlp_ratio": 2.5, "num_attention_heads": 2,
            "num_layers": 2, "out_channels": 8, "patch_size": [16, 1], "rope_theta": 1000000.0,
            "speaker_embedding_dim": 512, "text_embedding_dim": 32, "ssl_encoder_depths": [8, 8],
            "ssl_latent_dims": [16, 16], "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 100,
            "lyric_hidden_size": 1024}, (8, 16, 24),
            more=lambda g: {"conditioning_lyrics": torch.randint(0, 100, (1, 7), generator=g)}),
    Variant("ACE-Step 1.5", "ACEStep15", {"audio_model": "ace1.5", "hidden_size": 32, "text_hidden_dim": 32,
            "num_dit_layers": 2, "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1,
            "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 48, "fsq_dim": 32,
            "encoder_hidden_size": 32, "encoder_intermediate_size": 48, "encoder_num_heads": 2}, (64, 20),
            more=lambda g: {"conditioning_lyrics": torch.randn(1, 7, 32, generator=g)}),
    Variant("Stable Audio", "StableAudio", _STABLE_AUDIO, (64, 24), text=768, build=_stable_audio),
)  # fmt: skip
