"""The kit's model files: which there are, and how a folder comes to have them all, whole and up to date."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .diffusion_files import write_flux2, write_attention_lora
from .encoder_files import write_dinov3, write_siglip2
from .ip_adapter_files import write_ip_adapter
from .lora_files import write_bias_lora, write_sdxl_lora
from .predictor_files import write_predictor
from .seeded import written_recipe

VERSION = 5  # raise it when a writer changes: every file is then written anew

SIGLIP_WIDTH, DINO_WIDTH = 96, 128
IN_DIM = SIGLIP_WIDTH + DINO_WIDTH
Z_IMAGE = {"family": "z-image", "width": 96, "mlp_width": 256, "in_dim": IN_DIM}
QWEN_IMAGE = {"family": "qwen-image", "width": 32, "mlp_width": 128, "in_dim": IN_DIM}
QWEN_TEXT_WIDTH = 64

FILES: dict[str, tuple[Callable[..., Path], dict]] = {
    "i2l/kit/z_image_i2l.safetensors": (write_predictor, {**Z_IMAGE, "compress": 16, "seed": 1}),
    "i2l/kit/qwen_image_i2l_style.safetensors": (write_predictor, {**QWEN_IMAGE, "compress": 12, "seed": 2}),
    "i2l/kit/qwen_image_i2l_coarse.safetensors": (write_predictor, {
        **QWEN_IMAGE, "compress": 8, "residual": "coarse", "residual_mid": 4, "residual_width": QWEN_TEXT_WIDTH,
        "seed": 3}),
    "i2l/kit/qwen_image_i2l_fine.safetensors": (write_predictor, {
        **QWEN_IMAGE, "compress": 8, "residual": "fine", "residual_mid": 2, "residual_width": QWEN_TEXT_WIDTH,
        "seed": 4}),
    "i2l/kit/siglip2_small.safetensors": (write_siglip2, {"hidden": SIGLIP_WIDTH, "layers": 2, "seed": 5}),
    "i2l/kit/dinov3_small.safetensors": (write_dinov3, {"hidden": DINO_WIDTH, "layers": 2, "seed": 6}),
    "loras/kit/qwen_image_i2l_bias.safetensors": (write_bias_lora, {"width": 32, "mlp_width": 128, "seed": 7}),
    "loras/kit/sdxl_paper.safetensors": (write_attention_lora, {"seed": 8}),
    "loras/kit/sdxl_content.safetensors": (write_sdxl_lora, {"role": "content", "seed": 8}),
    "loras/kit/sdxl_style.safetensors": (write_sdxl_lora, {"role": "style", "seed": 8, "alpha": 4.0}),
    "diffusion_models/kit/flux2_small.safetensors": (write_flux2, {"seed": 0}),
    "ipadapter/kit/ip_adapter_sdxl_small.safetensors": (write_ip_adapter, {"loud": 3.0, "seed": 8}),
}


def recipe_of(name: str) -> str:
    """What decides a file's content, as one line; it is kept in the file's own metadata."""
    writer, options = FILES[name]
    return f"{VERSION} {writer.__name__} {sorted(options.items())}"


def ensure_files(models_dir: str | os.PathLike) -> list[Path]:
    """Writes what is missing, cut short or of another recipe; returns the files written (none on a second start)."""
    written = []
    for name, (writer, options) in FILES.items():
        path, recipe = Path(models_dir) / name, recipe_of(name)
        if written_recipe(path) != recipe:
            written.append(writer(path, recipe=recipe, **options))
    return written
