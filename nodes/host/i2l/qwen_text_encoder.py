"""What Qwen-Image's text encoder sees in a picture: the residual input of Coarse and Fine predictors.

As published (DiffSynth-Studio, `pipelines/qwen_image.py`): the picture alone in the edit template, no user text, the
last hidden states after the template's system turn. The host's own tokenizer and encoder use that template and that
cut, so they are used as they are.
"""

from __future__ import annotations

import comfy.model_management
import numpy as np
import torch

from ....weights.errors import StyleLoomError
from ....weights.i2l.layouts import RESIDUAL_TOKENS

_TOWER = "qwen25_7b"


def _refuse(found: str) -> StyleLoomError:
    return StyleLoomError(
        f"clip of Encode References: {found}",
        "Qwen-Image's text encoder with its vision part "
        "(qwen_2.5_vl_7b.safetensors or its fp8 version, loaded by Load CLIP as type qwen_image)",
        "Connect that one. It is needed only for Qwen-Image-i2L Coarse and Fine: leave clip unconnected otherwise.",
    )


def check_clip(clip) -> None:
    """Raises StyleLoomError where a CLIP is not Qwen-Image's, or lacks its vision part."""
    tower = getattr(clip.cond_stage_model, _TOWER, None)
    if tower is None:
        raise _refuse(f"it is {type(clip.cond_stage_model).__name__}")
    if not hasattr(tower.transformer, "visual"):
        raise _refuse("it has no vision part")


def text_view(clip, pixels: np.ndarray, view: str, on_picture) -> torch.Tensor:
    """Hidden states of one picture.

    Args:
        clip: a CLIP that passed `check_clip`.
        pixels: uint8 (side, side, 3) from `residual_image`.
        view: 'coarse' or 'fine'.
        on_picture: called when done.

    Returns:
        (1, tokens, text_width) bf16 on the CPU; 71 tokens for coarse, 1376 for fine.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    image = torch.from_numpy(pixels.astype(np.float32) / 255)[None]
    hidden = clip.encode_from_tokens(clip.tokenize("", images=[image]))
    if hidden.shape[1] != RESIDUAL_TOKENS[view]:
        raise _refuse(f"it makes {hidden.shape[1]} tokens of a picture, where {RESIDUAL_TOKENS[view]} are due")
    if not bool(hidden.isfinite().all()):
        raise _refuse("it gives NaN or infinity for this picture (an fp16 overflow or a damaged file)")
    on_picture()
    return hidden.to("cpu", torch.bfloat16)
