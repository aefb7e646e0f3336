"""What the adapters for transformers read of a picture that SigLIP has encoded."""

from __future__ import annotations

import dataclasses

import comfy.model_management
import comfy.utils
import torch

from ....weights.errors import StyleLoomError
from ....weights.ip_adapter.dit_formats import POOLED, SIGLIP, DiTAdapter
from ....weights.ip_adapter.formats import Adapter
from ....weights.ip_adapter.siglip_head import pooled, read_head
from .. import folders


def with_head(adapter: Adapter | DiTAdapter, file: str) -> Adapter | DiTAdapter:
    """The adapter with the pooling head of an encoder's file.

    Args:
        file: in the host's folder clip_vision.

    Raises:
        StyleLoomError: an adapter that needs none; a file without one.
    """
    if adapter.feature != POOLED:
        raise StyleLoomError(
            f"siglip_head is {file}, and {adapter.name} is an {adapter.label}",
            "siglip_head only for an adapter that reads SigLIP's pooled vector (InstantX, FLUX.1)",
            "Set siglip_head to none.",
        )
    tensors = comfy.utils.load_torch_file(folders.find(folders.VISION, file), safe_load=True)
    return dataclasses.replace(adapter, head=read_head(file, tensors, adapter.width))


def siglip_features(adapter: DiTAdapter, outputs: list, name: str) -> torch.Tensor:
    """(pictures, width) or (pictures, tokens, width) fp32, on the device to compute on.

    Raises:
        StyleLoomError: encoded by another encoder; no pooling head where one is needed.
    """
    field = "last_hidden_state" if adapter.feature == POOLED else adapter.feature
    if adapter.feature == POOLED and adapter.head is None:
        raise StyleLoomError(
            f"{adapter.name} reads SigLIP's pooled vector, which ComfyUI's image encoder does not give",
            "the encoder's pooling head, read from its file",
            "Choose the file of the encoder at siglip_head of Load IP-Adapter: model.safetensors of "
            "google/siglip-so400m-patch14-384, in models/clip_vision.",
        )
    device, found = comfy.model_management.get_torch_device(), []
    for output in outputs:
        hidden, embeds = getattr(output, field, None), getattr(output, "image_embeds", None)
        # CLIP's projected vector has two axes; what stands there of SigLIP are its hidden states.
        fits = isinstance(hidden, torch.Tensor) and hidden.ndim == 3 and hidden.shape[2] == adapter.width
        fits = fits and not (isinstance(embeds, torch.Tensor) and embeds.ndim == 2)
        if not fits or (adapter.encoder is SIGLIP and hidden.shape[1] != SIGLIP.tokens):
            size = f", {list(hidden.shape)}" if isinstance(hidden, torch.Tensor) else ""
            raise StyleLoomError(
                f"{name} was not encoded by the encoder of {adapter.name}{size}",
                f"an encoding by {SIGLIP.name}, (pictures, {SIGLIP.tokens}, {adapter.width})",
                f"Load {SIGLIP.file} with Load CLIP Vision and encode the picture with it.",
            )
        hidden = hidden.to(device, torch.float32)
        found.append(pooled(adapter.head, hidden) if adapter.feature == POOLED else hidden)
    return torch.cat(found)
