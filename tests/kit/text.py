"""Seeded text towers at small width behind the real tokenizers and templates, as the host's own CLIP objects.

Every tokenizer used here comes with the host. (FLUX.2-dev's does not: it travels inside its text encoder's file. The
small FLUX.2 uses klein's text side, whose tokenizer the host has.)
"""

from __future__ import annotations

import functools

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.z_image
import folder_paths
import torch
from comfy import sd1_clip

from . import diffusion
from .weights_fill import constant, fill, gain

_RULES = (
    (r"(embed_tokens|token_embedding)\.weight$", constant(1.0)),
    (r"position_embedding\.weight$", constant(0.3)),
    # Each layer adds its part to the stream: at full gain 32 of them would drown the token itself.
    (r"(out_proj|o_proj|fc2|down_proj|attn\.proj)\.weight$", gain(0.4)),
)


@functools.cache
def _tokenizer(cls: type, embedding_directory: tuple[str, ...]):
    """One of each: reading the vocabulary takes longer than making the model, and nothing writes to a tokenizer."""
    return cls(embedding_directory=list(embedding_directory), tokenizer_data={})


def _clip(tokenizer: type, model: type, seed: int, model_options: dict | None = None) -> comfy.sd.CLIP:
    def shared(embedding_directory, tokenizer_data):
        return _tokenizer(tokenizer, tuple(embedding_directory))

    target = comfy.supported_models_base.ClipTarget(shared, model)
    clip = comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"),
                         model_options={"dtype": torch.float32, **(model_options or {})})
    fill(clip.cond_stage_model, seed, _RULES)
    return clip


class _SmallQwen3(sd1_clip.SDClipModel):
    """Qwen3 with all its 36 layers, narrow; `layer` as the caller's architecture reads it."""

    def __init__(self, device="cpu", layer="hidden", layer_idx=-2, dtype=None, model_options={}):
        super().__init__(
            device=device, layer=layer, layer_idx=layer_idx, dtype=dtype, special_tokens={"pad": 151643},
            layer_norm_hidden_state=False, model_class=comfy.text_encoders.llama.Qwen3_4B,
            textmodel_json_config={"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2,
                                   "num_key_value_heads": 1},
            enable_attention_masks=True, return_attention_masks=True, model_options=model_options)


class _ZImageText(sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, dtype=dtype, name="qwen3_4b", clip_model=_SmallQwen3,
                         model_options=model_options)


class _KleinLayers(_SmallQwen3):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, layer=[9, 18, 27], layer_idx=None, dtype=dtype, model_options=model_options)


class _KleinText(comfy.text_encoders.flux.Flux2TEModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, dtype=dtype, name="qwen3_4b", clip_model=_KleinLayers,
                         model_options=model_options)


class _SmallQwen25VL(comfy.text_encoders.llama.Qwen25_7BVLI):
    """Qwen2.5-VL with both towers narrow. The host fixes the size of the vision tower, so it is made here.

    Eight vision layers are the first full period of the real pattern: seven with windows, one without.
    """

    def __init__(self, config_dict, dtype, device, operations):
        torch.nn.Module.__init__(self)
        config = comfy.text_encoders.llama.Qwen25_7BVLI_Config(**config_dict)
        self.num_layers = config.num_hidden_layers
        self.model = comfy.text_encoders.llama.Llama2_(config, device=device, dtype=dtype, ops=operations)
        self.visual = comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer(
            hidden_size=32, output_hidden_size=config.hidden_size, intermediate_size=64, num_heads=2, num_layers=8,
            device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


class _SmallQwen25(sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(
            device=device, layer="last", dtype=dtype, special_tokens={"pad": 151643}, layer_norm_hidden_state=False,
            model_class=_SmallQwen25VL,
            textmodel_json_config={"hidden_size": diffusion.QWEN_TEXT, "intermediate_size": 128,
                                   "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
            enable_attention_masks=True, return_attention_masks=True, model_options=model_options)


class _QwenImageText(comfy.text_encoders.qwen_image.QwenImageTEModel):
    """The host's own cut of the template around the small towers."""

    def __init__(self, device="cpu", dtype=None, model_options={}):
        sd1_clip.SD1ClipModel.__init__(self, device=device, dtype=dtype, name="qwen25_7b", clip_model=_SmallQwen25,
                                       model_options=model_options)


def z_image_text(seed: int = 0) -> comfy.sd.CLIP:
    """Z-Image's text side: the real Qwen tokenizer and chat template, hidden width 64 (2560 in the real one)."""
    return _clip(comfy.text_encoders.z_image.ZImageTokenizer, _ZImageText, seed)


def qwen_image_text(seed: int = 0) -> comfy.sd.CLIP:
    """Qwen-Image's text side with its vision tower: real tokenizer, templates and image path, hidden width 64."""
    return _clip(comfy.text_encoders.qwen_image.QwenImageTokenizer, _QwenImageText, seed)


def flux2_text(seed: int = 0) -> comfy.sd.CLIP:
    """FLUX.2 klein's text side: layers 9, 18 and 27 of width 64, side by side."""
    return _clip(comfy.text_encoders.flux.KleinTokenizer, _KleinText, seed)


def _clip_config(hidden: int) -> dict:
    return {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 2, "projection_dim": hidden}


def sdxl_text(seed: int = 0) -> comfy.sd.CLIP:
    """SDXL's two text towers with their real 12 and 32 layers, widths 32 and 48."""
    return _clip(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel, seed, {
        "clip_l_model_config": _clip_config(diffusion.SDXL_CLIP_L),
        "clip_g_model_config": _clip_config(diffusion.SDXL_CLIP_G)})


def sd15_text(seed: int = 0) -> comfy.sd.CLIP:
    """SD1.5's CLIP-L with its real 12 layers, width 32."""
    return _clip(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel, seed,
                 {"clip_l_model_config": _clip_config(diffusion.SD15_CLIP_L)})
