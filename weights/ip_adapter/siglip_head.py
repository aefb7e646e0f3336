"""SigLIP's pooled vector from its last hidden states.

ComfyUI's CLIP vision gives SigLIP's hidden states, the norm behind the last layer included, and leaves out the head
that makes one vector of them, with which InstantX's adapter for FLUX.1 was trained: a learned query that attends to all
tokens, and an MLP beside a skip. Formula and names: transformers, `SiglipMultiheadAttentionPoolingHead`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..errors import StyleLoomError

PREFIX = "vision_model.head."
HEAD_WIDTH = 72  # of SigLIP so400m: 16 heads in a width of 1152
_EPS = 1e-6


def read_head(name: str, tensors: Mapping[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """The head's tensors out of an encoder's file, in fp32 and without the prefix.

    Args:
        name: of the file, for messages. width: of the vector that the adapter reads.

    Raises:
        StyleLoomError: tensors missing or of another size.
    """
    due = {"probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width)}
    due |= {"attention.in_proj_bias": (3 * width,), "attention.out_proj.weight": (width, width)}
    due |= {f"{part}.{end}": (width,) for part in ("layernorm",) for end in ("weight", "bias")}
    due |= {"attention.out_proj.bias": (width,), "mlp.fc2.bias": (width,)}
    first = tensors.get(f"{PREFIX}mlp.fc1.weight")
    wide = len(first) if first is not None else 0
    due |= {"mlp.fc1.weight": (wide, width), "mlp.fc1.bias": (wide,), "mlp.fc2.weight": (width, wide)}
    for key, shape in due.items():
        found = tensors.get(PREFIX + key)
        if found is None or tuple(found.shape) != shape:
            what = "is missing" if found is None else f"is {list(found.shape)} where {list(shape)} is due"
            raise StyleLoomError(
                f"siglip_head is {name}, and {PREFIX}{key} {what}",
                f"a SigLIP encoder of width {width} with its pooling head",
                "Choose the whole encoder, model.safetensors of google/siglip-so400m-patch14-384.",
            )
    return {key: tensors[PREFIX + key].float() for key in due}


def pooled(head: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """(pictures, width) fp32 on the device of `hidden`.

    Args:
        head: from `read_head`. hidden: last hidden states behind the last norm, (pictures, tokens, width).
    """
    x = hidden.float()
    w = {key: value.to(x.device) for key, value in head.items()}
    width = x.shape[-1]
    seen, _ = F.multi_head_attention_forward(
        w["probe"].expand(1, len(x), width),
        x.transpose(0, 1),
        x.transpose(0, 1),
        width,
        max(width // HEAD_WIDTH, 1),
        w["attention.in_proj_weight"],
        w["attention.in_proj_bias"],
        None,
        None,
        False,
        0.0,
        w["attention.out_proj.weight"],
        w["attention.out_proj.bias"],
        training=False,
        need_weights=False,
    )
    seen = seen[0]
    y = F.layer_norm(seen, (width,), w["layernorm.weight"], w["layernorm.bias"], _EPS)
    y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]), approximate="tanh")
    return seen + F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
