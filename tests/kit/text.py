"""Seeded text towers at small width behind the real tokenizers and templates, as the host's own CLIP objects."""

from __future__ import annotations

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.llama
import comfy.text_encoders.z_image
import folder_paths
import torch
from comfy import sd1_clip

from .diffusion import Z_IMAGE_TEXT
from .weights_fill import constant, fill

_LLAMA_RULES = ((r"embed_tokens\.weight$", constant(1.0)),)


def _clip(tokenizer: type, model: type, seed: int, rules=()) -> comfy.sd.CLIP:
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    clip = comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"),
                         model_options={"dtype": torch.float32})
    fill(clip.cond_stage_model, seed, (*_LLAMA_RULES, *rules), keep_buffers=lambda name: name.endswith("inv_freq"))
    return clip


class _SmallQwen3(sd1_clip.SDClipModel):
    """Qwen3 with four narrow layers; "hidden" -2 is the layer that Z-Image reads."""

    def __init__(self, device="cpu", layer="hidden", layer_idx=-2, dtype=None, attention_mask=True, model_options={}):
        super().__init__(
            device=device, layer=layer, layer_idx=layer_idx, dtype=dtype, special_tokens={"pad": 151643},
            layer_norm_hidden_state=False, model_class=comfy.text_encoders.llama.Qwen3_4B,
            textmodel_json_config={"hidden_size": Z_IMAGE_TEXT, "intermediate_size": 128, "num_hidden_layers": 4,
                                   "num_attention_heads": 2, "num_key_value_heads": 1},
            enable_attention_masks=attention_mask, return_attention_masks=attention_mask, model_options=model_options)


class _ZImageText(sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):
        super().__init__(device=device, dtype=dtype, name="qwen3_4b", clip_model=_SmallQwen3,
                         model_options=model_options)


def z_image_text(seed: int = 0) -> comfy.sd.CLIP:
    """Z-Image's text side: the real Qwen tokenizer and chat template, hidden width 64 (2560 in the real one)."""
    return _clip(comfy.text_encoders.z_image.ZImageTokenizer, _ZImageText, seed)
