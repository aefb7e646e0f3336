"""What a LoRA was made for, by its keys: published names and widths of each family, in several spellings."""

from __future__ import annotations

import pytest
import torch
from styleloom.weights.lora.made_for import made_for


def lora(*layers):
    """(stem, columns) or (stem, columns, rows) -> a pair each, of rank 1."""
    made = {}
    for stem, columns, *rows in layers:
        made[f"{stem}.lora_down.weight"] = torch.empty(1, columns, device="meta")
        made[f"{stem}.lora_up.weight"] = torch.empty(*(rows or [8]), 1, device="meta")
    return made


@pytest.mark.parametrize(
    ("layers", "family"),
    [
        ([("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 768)], "SD1.5"),
        ([("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k", 1024)], "SD2"),
        ([("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048)], "SDXL"),
        ([("lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2", 5120)], "SDXL"),
        ([("lora_unet_double_blocks_18_img_attn_qkv", 3072), ("lora_unet_single_blocks_37_linear1", 3072)], "FLUX.1"),
        ([("transformer.single_transformer_blocks.3.attn.to_q", 3072),
          ("transformer.transformer_blocks.3.attn.to_q", 3072)], "FLUX.1"),
        ([("diffusion_model.single_blocks.7.linear1", 6144)], "FLUX.2"),
        ([("diffusion_model.single_blocks.7.linear1", 3072, 27648)], "FLUX.2"),
        ([("diffusion_model.single_blocks.7.linear1", 3072, 21504)], "FLUX.1"),
        ([("transformer.single_transformer_blocks.3.attn.to_qkv_mlp_proj", 3072)], "FLUX.2"),
        ([("diffusion_model.double_blocks.19.img_attn_qkv", 3072)], "HunyuanVideo"),
        ([("diffusion_model.layers.3.attention.to_q", 3840)], "Z-Image"),
        ([("layers.3.attention.qkv", 2304)], "Lumina 2"),
        ([("lora_unet_layers_3_feed_forward_w2", 10240)], "Z-Image or Lumina 2"),
        ([("transformer_blocks.2.attn.to_q", 3072), ("transformer_blocks.2.img_mlp.net.2", 12288)], "Qwen-Image"),
        ([("transformer.transformer_blocks.59.attn.to_q", 3072)], "Qwen-Image"),
        ([("transformer.transformer_blocks.5.attn.to_q", 1536)], "SD3"),
        ([("lora_unet_joint_blocks_3_x_block_attn_qkv", 1536)], "SD3"),
        ([("transformer.transformer_blocks.5.attn.add_q_proj", 3072)], "Qwen-Image, FLUX.1 or SD3"),
        ([("transformer.transformer_blocks.5.attn.to_q", 6144)], ""),
        ([("diffusion_model.single_blocks.7.linear2", 15360, 3072)], "FLUX.1"),
        ([("diffusion_model.single_blocks.7.linear2", 12288, 3072)], "FLUX.2"),
        ([("diffusion_model.double_blocks.2.img_attn.proj", 3072)], "FLUX.1 or FLUX.2"),
        ([("lora_unet_down_blocks_1_attentions_0_proj_in", 640)], "SD1.5, SD2 or SDXL"),
        ([("lora_unet_down_blocks_0_attentions_0_proj_in", 320)], "SD1.5 or SD2"),
        ([("diffusion_model.blocks.3.cross_attn.q_linear", 1152)], "PixArt"),
        ([("diffusion_model.blocks.0.self_attn.q", 5120)], "Wan"),
        ([("lora_unet__blocks_0_cross_attn_k", 5120)], "Wan"),
        ([("diffusion_model.blocks.0.self_attn.q_proj", 2048)], "Cosmos or Anima"),
        ([("transformer.transformer_blocks.5.attn1.to_q", 2048)], "LTX-Video"),
        ([("transformer.transformer_blocks.5.attn1.to_q", 1152)], "PixArt"),
        ([("lora_prior_unet_down_blocks_0_1_attention_attn_to_q", 64)], "Stable Cascade"),
        ([("lora_te1_text_model_encoder_layers_0_mlp_fc1", 768)], "a text encoder"),
        ([("somewhere.else", 7)], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_families(layers, family):
    assert made_for(lora(*layers)) == family


def test_a_text_encoder_beside_the_model_changes_nothing():
    both = [("lora_te_text_model_encoder_layers_0_mlp_fc1", 768), ("diffusion_model.blocks.0.ffn.0", 5120)]
    assert made_for(lora(*both)) == "Wan"


@pytest.mark.parametrize("strange", [{"a": 3}, {7: torch.ones(1)}, {"blocks.0.self_attn.q.lora_down.weight": None}])
def test_what_is_no_lora(strange):
    assert made_for(strange) in ("", "Wan")
