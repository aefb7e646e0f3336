"""The nodes of cubiq/ComfyUI_IPAdapter_plus (commit 9d076a3): widgets in order with defaults, and what their settings
are called here. Facts only."""

from __future__ import annotations

import re

_TIMES = (("start_at", 0.0), ("end_at", 1.0))
_SCALING = (("embeds_scaling", "V only"),)
_COMBINE = (("combine_embeds", "concat"),)
_BATCH = (("encode_batch_size", 0),)
_TYPED = (("weight", 1.0), ("weight_type", "linear"))
_BOTH = (("weight_style", 1.0), ("weight_composition", 1.0), ("expand_style", False))
_FULL = (*_TYPED, *_COMBINE, *_TIMES, *_SCALING)

# Node type -> its widgets: (name, default), in the editor's order.
WIDGETS: dict[str, tuple[tuple[str, object], ...]] = {
    "IPAdapter": (("weight", 1.0), *_TIMES, ("weight_type", "standard")),
    "IPAdapterAdvanced": _FULL,
    "IPAdapterBatch": (*_TYPED, *_TIMES, *_SCALING, *_BATCH),
    "IPAdapterStyleComposition": (*_BOTH, ("combine_embeds", "average"), *_TIMES, *_SCALING),
    "IPAdapterStyleCompositionBatch": (*_BOTH, *_TIMES, *_SCALING),
    "IPAdapterMS": (
        *(("weight", 1.0), ("weight_faceidv2", 1.0), ("weight_type", "linear")),
        *(*_COMBINE, *_TIMES, *_SCALING, ("layer_weights", "")),
    ),
    "IPAdapterClipVisionEnhancer": (*_FULL, ("enhance_tiles", 2), ("enhance_ratio", 1.0)),
    "IPAdapterClipVisionEnhancerBatch": (
        *(*_TYPED, *_TIMES, *_SCALING),
        *(("enhance_tiles", 2), ("enhance_ratio", 0.5), *_BATCH),
    ),
    "IPAdapterPreciseStyleTransfer": (("weight", 1.0), ("style_boost", 1.0), *_COMBINE, *_TIMES, *_SCALING),
    "IPAdapterPreciseStyleTransferBatch": (("weight", 1.0), ("style_boost", 1.0), *_COMBINE, *_TIMES, *_SCALING),
    "IPAdapterPreciseComposition": (("weight", 1.0), ("composition_boost", 0.0), *_COMBINE, *_TIMES, *_SCALING),
    "IPAdapterPreciseCompositionBatch": (("weight", 1.0), ("composition_boost", 0.0), *_COMBINE, *_TIMES, *_SCALING),
    "IPAdapterTiled": (*_TYPED, *_COMBINE, *_TIMES, ("sharpening", 0.0), *_SCALING),
    "IPAdapterTiledBatch": (*_TYPED, *_TIMES, ("sharpening", 0.0), *_SCALING, *_BATCH),
    "IPAdapterEmbeds": (*_TYPED, *_TIMES, *_SCALING),
    "IPAdapterEmbedsBatch": (*_TYPED, *_TIMES, *_SCALING),
    "IPAdapterFromParams": (*_COMBINE, *_SCALING),
    "IPAdapterRegionalConditioning": (
        *(("image_weight", 1.0), ("prompt_weight", 1.0), ("weight_type", "linear")),
        *_TIMES,
    ),
    "IPAdapterCombineParams": (),
    "IPAdapterUnifiedLoader": (("preset", "PLUS (high strength)"),),
    "IPAdapterUnifiedLoaderCommunity": (("preset", "Composition"),),
    "IPAdapterModelLoader": (("ipadapter_file", ""),),
    "IPAdapterEncoder": (("weight", 1.0),),
    "IPAdapterCombineEmbeds": (("method", "concat"),),
    "IPAdapterNoise": (("type", "fade"), ("strength", 1.0), ("blur", 0)),
    "PrepImageForClipVision": (("interpolation", "LANCZOS"), ("crop_position", "center"), ("sharpening", 0.0)),
    "IPAdapterSaveEmbeds": (("filename_prefix", "IP_embeds"),),
    "IPAdapterLoadEmbeds": (("embeds", ""),),
    "IPAdapterWeights": (
        *(("weights", "1.0, 0.0"), ("timing", "linear"), ("frames", 0), ("start_frame", 0), ("end_frame", 9999)),
        *(("add_starting_frames", 0), ("add_ending_frames", 0), ("method", "full batch")),
    ),
}
NAMES = {kind: tuple(name for name, _ in widgets) for kind, widgets in WIDGETS.items()}

_FACE = "it reads face vectors of insightface, whose models are not free for commercial use; StyleLoom leaves faces out"
# Node type -> why it has no counterpart.
NONE = {
    "IPAdapterFaceID": _FACE,
    "IPAdapterFaceIDKolors": _FACE,
    "IPAAdapterFaceIDBatch": _FACE,
    "IPAdapterUnifiedLoaderFaceID": _FACE,
    "IPAdapterInsightFaceLoader": _FACE,
    "IPAdapterTiledBatch": "tiles and one reference per picture do not go together",
    "IPAdapterWeightsFromStrategy": "make the weights with Style Weights",
    "IPAdapterPromptScheduleFromWeightsStrategy": "it makes a text for another pack's prompt schedule",
    "IPAdapterCombineWeights": "write the numbers into Style Weights, one after the other",
}

OTHER = "IPAdapter Plus: "
_SAME = {"style transfer": "style", "composition": "layout", "style and composition": "style + layout"}
TYPES = (
    *("linear", "ease in", "ease out", "ease in-out", "reverse in-out"),
    *("weak input", "weak output", "weak middle", "strong middle"),
    *("strong style transfer", "strong style and composition", "style transfer precise", "composition precise"),
)
PRESETS = {name: OTHER + _SAME.get(name, name) for name in (*TYPES, *_SAME)}
SIMPLE = {"standard": "linear", "prompt is more important": "ease out", "style transfer": "style transfer"}
WITHOUT_MIDDLE = (OTHER + "style", OTHER + "layout", OTHER + "style + layout", OTHER + "style transfer precise")
SCALINGS = {
    "V only": "V",
    "K+V": "K+V",
    "K+V w/ C penalty": "K+V, by width",
    "K+mean(V) w/ C penalty": "K+mean(V), by width",
}
COMBINES = ("concat", "add", "subtract", "average", "norm average", "max", "min")
TIMINGS = {"custom": "custom", "linear": "linear", "ease_in_out": "ease in-out", "ease_in": "ease in",
           "ease_out": "ease out", "random": "random"}  # fmt: skip
METHODS = ("full batch", "shift batches", "alternate batches")
CROPS = {"center": ("crop", "middle"), "pad": ("pad", "middle")} | {
    place: ("crop", place) for place in ("top", "bottom", "left", "right")
}

VIT_H, BIG_G = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors"
VIT_L = "clip-vit-large-patch14-336.bin"
SDXL, SD15 = "sdxl", "sd1.5"
# Unified Loader's preset, first words -> (file for SDXL, file for SD1.5, image encoder), by their published names.
FILES = {
    "light": (None, "ip-adapter_sd15_light_v11.bin", VIT_H),
    "standard": ("ip-adapter_sdxl_vit-h.safetensors", "ip-adapter_sd15.safetensors", VIT_H),
    "vit-g": ("ip-adapter_sdxl.safetensors", "ip-adapter_sd15_vit-G.safetensors", BIG_G),
    "plus face": ("ip-adapter-plus-face_sdxl_vit-h.safetensors", "ip-adapter-plus-face_sd15.safetensors", VIT_H),
    "plus": ("ip-adapter-plus_sdxl_vit-h.safetensors", "ip-adapter-plus_sd15.safetensors", VIT_H),
    "full face": (None, "ip-adapter-full-face_sd15.safetensors", VIT_H),
    "composition": ("ip_plus_composition_sdxl.safetensors", "ip_plus_composition_sd15.safetensors", VIT_H),
    "kolors": ("Kolors-IP-Adapter-Plus.bin", None, VIT_L),
}


def files_of(preset: str, base: str) -> tuple[str | None, str]:
    """(file of the adapter, or None where there is none for this base; image encoder)."""
    key = next((key for key in FILES if preset.lower().startswith(key)), None)
    if key is None:
        return None, VIT_H
    xl, old, encoder = FILES[key]
    return (xl if base == SDXL else old), encoder


_XL = re.compile(r"xl|pony|illustrious|noob|animagine|kolors", re.IGNORECASE)
_OLD = re.compile(r"v?1[._-]5|sd15|sd1|dreamshaper_8|deliberate|revanimated|realistic", re.IGNORECASE)


def base_of(names: list[str], sizes: list[int]) -> tuple[str, str]:
    """(SDXL or SD1.5, why) from the names of checkpoints and the sides of empty latents."""
    for name in names:
        if _XL.search(name):
            return SDXL, f"for the checkpoint's name {name}"
        if _OLD.search(name):
            return SD15, f"for the checkpoint's name {name}"
    if sizes:
        return (SDXL if max(sizes) > 768 else SD15), f"for a picture of {max(sizes)} pixels"
    return SDXL, "as nothing in the workflow says"
