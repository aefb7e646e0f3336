"""Says what kind of model a file holds, from the names of its tensors alone.

Used in errors only: a node that gets the wrong file can then say "this is a LoRA" and not just "wrong file". The files
that the pack works with are recognised, and checked tensor by tensor, in `header.py` and `towers.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

# A part of a tensor's name → what a file with such a name is; the surest sign first.
MARKS = (
    ("emb2lora.", "an i2L v2 predictor"),
    ("module_dict.", "a compressed i2L predictor, of which none was published"),
    (".proj_a.proj_in.", "an i2L v1 predictor, which belongs into Load i2L Predictor"),
    ("lora_A.", "a LoRA"),
    ("lora_B.", "a LoRA"),
    ("lora_down.", "a LoRA"),
    ("lora_up.", "a LoRA"),
    ("lokr_", "a LoKr"),
    ("hada_", "a LoHa"),
    ("text_model.", "a CLIP or SigLIP file with its text part"),
    ("vision_model.", "a CLIP or SigLIP vision file for ComfyUI's Load CLIP Vision"),
    ("embeddings.patch_embeddings.projection.", "a DINOv2 or ViT file"),
    ("model.layer.", "a DINOv3 file saved under other names"),
    ("head.probe", "the SigLIP2-G384 image encoder"),
    ("layer.0.mlp.gate_proj", "the DINOv3-7B image encoder"),
    ("first_stage_model.", "a checkpoint"),
    ("diffusion_model.", "a diffusion model"),
    ("transformer_blocks.", "a diffusion model"),
    ("double_blocks.", "a diffusion model"),
    ("noise_refiner.", "a diffusion model"),
    ("decoder.conv_in.", "a VAE"),
    ("decoder.up_blocks.", "a VAE"),
    ("model.layers.", "a language model"),
    ("embeddings", "an embeddings file (references, or a textual inversion)"),
)


def describe(names: Iterable[str]) -> str:
    """The kind of a file with these tensor names, in words that follow "this is"."""
    names = list(names)
    if not names:
        return "a file without any tensor"
    joined = "\n".join(names)
    for mark, kind in MARKS:
        if mark in joined:
            return kind
    return f"something else (first tensors: {', '.join(names[:3])})"
