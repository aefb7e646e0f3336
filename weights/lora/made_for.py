"""What a LoRA was made for, by the names and the sizes of its layers: a word for messages, never a decision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .keys import key_part
from .names import bare, is_text_key

# Names that only one family has, bare and with `_` for `.`. The first family of which a file has such a layer is the
# one; the order matters where one family's names begin like those of another.
_FAMILIES: tuple[tuple[str, str], ...] = (
    ("Stable Cascade", r"lora_prior_unet_"),
    ("UNet", r"(?:input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks)_"),
    ("HiDream", r"(?:double|single)_stream_blocks_\d+_block_"),
    ("AuraFlow", r"joint_transformer_blocks_|double_layers_|single_layers_"),
    ("Hunyuan DiT", r"blocks_\d+_attn\d_(?:Wqkv|q_proj|kv_proj|out_proj)"),
    ("PixArt", r"blocks_\d+_(?:attn_(?:qkv|proj)|cross_attn_(?:q_linear|kv_linear|proj))$"),
    ("Double and single", r"(?:double|single)_blocks_\d|single_transformer_blocks_|\w+_stream_modulation"),
    ("SD3", r"joint_blocks_|transformer_blocks_\d+_(?:ff_context|norm1_context)"),
    ("Qwen-Image", r"transformer_blocks_\d+_(?:img_mlp|txt_mlp|img_mod|txt_mod)"),
    ("LTX-Video", r"transformer_blocks_\d+_(?:audio_|video_)|patchify_proj"),
    ("Z-Image", r"(?:layers|noise_refiner|context_refiner)_\d+_(?:attention_|feed_forward_w\d|adaLN_modulation)"),
    ("Cosmos or Anima", r"blocks_\d+_(?:(?:self_attn|cross_attn)_(?:[qkv]_proj|output_proj)|adaln_)|llm_adapter"),
    ("Wan", r"(?:vace_)?blocks_\d+_(?:(?:self_attn|cross_attn)_(?:[qkvo]|norm_[qk]|[kv]_img)$|ffn_\d|modulation)"),
    ("Two streams", r"transformer_blocks_\d+_attn_"),
    ("One stream", r"transformer_blocks_\d+_(?:attn\d|ff)_"),
)
_FLAT = re.compile(r"^(?:lora_(?:unet|transformer)_|lycoris_)_?")


def made_for(lora: Mapping[str, Any]) -> str:
    """The family of models that a LoRA was made for, '' where it is not recognised.

    Args:
        lora: Keys of a LoRA in any spelling, with their tensors; what is no tensor counts as of unknown size.
    """
    sizes: dict[str, list[int]] = {}
    for key, tensor in lora.items():
        found = key_part(key) if isinstance(key, str) else None
        if found is None:
            continue
        stem, part = found
        shape = tuple(getattr(tensor, "shape", ()))
        size = sizes.setdefault(stem, [0, 0])
        if part == "down" and len(shape) >= 2:
            size[0] = shape[1]
        if part == "up" and len(shape) >= 2:
            size[1] = shape[0]
    text = {stem for stem in sizes if is_text_key(stem)}
    layers = {_flat(stem): (stem, *size) for stem, size in sizes.items() if stem not in text}
    if not layers:
        return "a text encoder" if text else ""
    for name, pattern in _FAMILIES:
        if any(re.match(pattern, flat) for flat in layers):
            return _REFINE[name](layers) if name in _REFINE else name
    return ""


def _flat(stem: str) -> str:
    return bare(_FLAT.sub("", bare(stem)).replace(".", "_"))


def _numbers(layers, pattern: str) -> list[int]:
    return [int(match[1]) for flat in layers if (match := re.search(pattern, flat))]


def _width(layers, pattern: str, of: int = 1) -> int:
    """Of the inputs (1) or the outputs (2) of the first such layer, 0 where it is not known."""
    return next((layer[of] for flat, layer in layers.items() if layer[of] and re.search(pattern, flat)), 0)


def _unet(layers) -> str:
    """By the width of the text that cross-attention reads, else by blocks that only one of them has."""
    by_text = {768: "SD1.5", 1024: "SD2", 2048: "SDXL", 1280: "the SDXL refiner"}
    found = by_text.get(_width(layers, r"attn2_(?:processor_)?to_[kv]$"))
    if found:
        return found
    if any(re.search(r"transformer_blocks_[1-9]|label_emb|add_embedding", flat) for flat in layers):
        return "SDXL"
    outer = r"(?:down_blocks_0|up_blocks_3)_attentions|input_blocks_[12]_1_|output_blocks_(?:6|7|8|9|10|11)_1_"
    return "SD1.5 or SD2" if any(re.search(outer, flat) for flat in layers) else "SD1.5, SD2 or SDXL"


def _double_and_single(layers) -> str:
    doubles = _numbers(layers, r"double_blocks_(\d+)_") + _numbers(layers, r"^transformer_blocks_(\d+)_")
    singles = _numbers(layers, r"single_(?:transformer_)?blocks_(\d+)_")
    last = max(doubles, default=0), max(singles, default=0)
    if any("to_qkv_mlp_proj" in flat or "stream_modulation" in flat for flat in layers) or last[1] >= 40:
        return "FLUX.2"
    hunyuan = any(re.search(r"individual_token_refiner|_img_mod_linear|_mlp_fc\d", flat) for flat in layers)
    if hunyuan or last[0] >= 19 or last[1] >= 38:
        return "HunyuanVideo"
    # Attention beside an MLP that is 4 times as wide in FLUX.1, and 3 times and gated in FLUX.2: widths out of and into
    # the fused layers; FLUX.2 dev and klein 9B are wider, too. Its 8 blocks of two streams share their modulation.
    up, down = r"single_blocks_\d+_linear1$", r"single_blocks_\d+_linear2$"
    ratios = {_ratio(_width(layers, up, 2), _width(layers, up)), -_ratio(_width(layers, down), _width(layers, down, 2))}
    width = _width(layers, r"single_blocks_\d+_linear1$|double_blocks_\d+_(?:img|txt)_attn_(?:qkv|q|k|v)$")
    if width in (4096, 6144) or ratios & {9, -4}:
        return "FLUX.2"
    own = (
        r"_mod_lin$|single_blocks_\d+_modulation"
        r"|single_transformer_blocks_\d+_(?:attn_to_[qkv]$|proj_mlp|norm_linear)"
    )
    if ratios & {7, -5} or last[0] >= 8 or any(re.search(own, flat) for flat in layers):
        return "FLUX.1"
    return "FLUX.1 or FLUX.2"


def _ratio(a: int, b: int) -> int:
    return a // b if b and a % b == 0 else 0


def _z_image(layers) -> str:
    width = _width(layers, r"attention_(?:qkv|to_q|q)$|feed_forward_w1$")
    return {3840: "Z-Image", 2304: "Lumina 2"}.get(width, "Z-Image or Lumina 2")


def _two_streams(layers) -> str:
    """Blocks that Qwen-Image, SD3, FLUX.1 and others call alike in diffusers."""
    width = _width(layers, r"attn_(?:to|add)_[qkv](?:_proj)?$")
    last = max(_numbers(layers, r"transformer_blocks_(\d+)_"), default=0)
    joint = any(re.search(r"attn_(?:add_[qkv]_proj|to_add_out)$", flat) for flat in layers)
    if width in (1536, 2432):
        return "SD3"
    if last >= 38 or (joint and width == 3072 and last >= 19):
        return "Qwen-Image"
    return "Qwen-Image, FLUX.1 or SD3" if joint else ""


def _one_stream(layers) -> str:
    width = _width(layers, r"attn1_to_[qkv]$")
    return {1152: "PixArt", 2048: "LTX-Video", 4096: "LTX-Video"}.get(width, "LTX-Video or PixArt")


_REFINE = {
    "UNet": _unet,
    "Double and single": _double_and_single,
    "Z-Image": _z_image,
    "Two streams": _two_streams,
    "One stream": _one_stream,
}
