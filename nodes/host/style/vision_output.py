"""CLIP_VISION_OUTPUT, the host's: making one, reading one, and what this pack notes on its own.

Notes are further attributes, which consumers that do not know them leave alone:
`styleloom_empty`, penultimate hidden states of an empty picture by the same encoder, and `styleloom_empty_embeds`, its
`image_embeds`; `styleloom_subtracted`, in words, that `image_embeds` was changed while the patch features were not;
`styleloom_only`, the one field that a file held.
"""

from __future__ import annotations

import copy
import weakref

import comfy.clip_vision
import comfy.model_management
import torch

from ....weights.clip_space.towers import image_tower
from ....weights.errors import StyleLoomError
from ....weights.ip_adapter.dit_formats import DiTAdapter
from ....weights.ip_adapter.formats import Adapter
from ..progress import Steps
from .siglip_output import siglip_features
from .squares import FITS, POSITIONS, masked, places, squares

__all__ = ["FITS", "POSITIONS", "encode_picture", "features", "places", "sizes", "squares", "with_embeds"]

_AT_ONCE = 8
_empty: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def encode_picture(
    clip_vision,
    image: torch.Tensor,
    fit: str,
    position: str = POSITIONS[0],
    mask: torch.Tensor | None = None,
    weight: float = 1.0,
):
    """Encode pictures with the host's encoder, a few at a time.

    Args:
        image: (pictures, height, width, channels). fit, position: see `squares.py`.
        mask: what of the pictures is seen, see `squares.masked`.
        weight: multiplies what the encoder gives; not the encoding of the empty picture.

    Raises:
        StyleLoomError: no picture; values that are not finite.
    """
    if image.ndim != 4 or not image.numel() or image.shape[-1] < 3:
        raise StyleLoomError(
            f"image is {list(image.shape)}",
            "a batch (pictures, height, width, 3)",
            "Look at the node that makes it: it gave an empty batch or no colours.",
        )
    if not bool(image.isfinite().all()):
        raise StyleLoomError("image has values that are not finite", "0 to 1", "Look at the node that makes it.")
    if mask is not None:
        image = masked(image, mask, clip_vision.image_mean)
    pictures = squares(image, fit, clip_vision.image_mean, position)
    steps = Steps(-(-len(pictures) // _AT_ONCE))
    parts = []
    for first in range(0, len(pictures), _AT_ONCE):
        parts.append(clip_vision.encode_image(pictures[first : first + _AT_ONCE], crop=True))
        steps()
    whole = comfy.clip_vision.Output()
    for name, value in vars(parts[0]).items():
        values = [getattr(part, name) for part in parts]
        if isinstance(value, torch.Tensor):
            whole[name] = torch.cat(values) * weight if weight != 1.0 else torch.cat(values)
        else:
            whole[name] = [item for part in values for item in part] if isinstance(value, list) else value
    if clip_vision.model_type == "clip_vision_model":
        whole["styleloom_empty"], whole["styleloom_empty_embeds"] = _encode_empty(clip_vision)
    return whole


def _encode_empty(clip_vision) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate hidden states and `image_embeds` of an input of zeros, which is the encoder's mean colour. The former
    are what the publisher gives the unconditional side of plus adapters (`IPAdapterPlus.get_image_embeds`, zeros after
    the normalisation)."""
    if clip_vision not in _empty:
        comfy.model_management.load_model_gpu(clip_vision.patcher)
        side = clip_vision.image_size
        pixels = torch.zeros(1, 3, side, side, device=clip_vision.load_device)
        out = clip_vision.model(pixel_values=pixels, intermediate_output=-2)
        _empty[clip_vision] = tuple(t.to(comfy.model_management.intermediate_device()) for t in out[1:3])
    return _empty[clip_vision]


def sizes(output, name: str) -> tuple[int, int, int]:
    """(width of the hidden states, length of the projected vector, tokens) of an encoded picture.

    Raises:
        StyleLoomError: no output of a CLIP encoder (SigLIP and DINO have no projected vector).
    """
    only = getattr(output, "styleloom_only", None)
    if only:
        raise StyleLoomError(
            f"{name} was loaded from a file that holds {only} only",
            "the whole output of an image encoder",
            "Encode the picture with Encode Style Image.",
        )
    hidden = getattr(output, "penultimate_hidden_states", None)
    embeds = getattr(output, "image_embeds", None)
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or embeds is None or embeds.ndim != 2:
        raise StyleLoomError(
            f"{name} was made by an encoder without a projected image vector (SigLIP, DINO)",
            "the output of a CLIP encoder (ViT-H, ViT-bigG, ViT-L)",
            "Load a CLIP image encoder with Load CLIP Vision and encode the picture with it.",
        )
    return hidden.shape[2], embeds.shape[1], hidden.shape[1]


def features(adapter: Adapter | DiTAdapter, outputs: list, name: str) -> torch.Tensor:
    """What the adapter reads of encoded pictures, (pictures, …), on the device to compute on.

    Raises:
        StyleLoomError: encoded by another encoder than the adapter's; content subtracted where it cannot be seen.
    """
    if isinstance(adapter, DiTAdapter) and adapter.feature != "image_embeds":
        return siglip_features(adapter, outputs, name)
    for output in outputs:
        only = getattr(output, "styleloom_only", None)
        if only is not None and only == adapter.feature and getattr(output, only).shape[-1] == adapter.width:
            continue
        found = sizes(output, name)
        tower = image_tower(*found)
        width = found[1] if adapter.feature == "image_embeds" else found[0]
        if (adapter.encoder is not None and tower is not adapter.encoder) or width != adapter.width:
            due = adapter.encoder
            raise StyleLoomError(
                f"{name} was encoded by {tower.name if tower else 'an encoder'} (width {found[0]}, {found[1]} "
                f"projected, {found[2]} tokens)",
                f"for {adapter.name}: {due.name if due else f'an encoder whose {adapter.feature} is {adapter.width}'}",
                f"Load {due.file} with Load CLIP Vision." if due else "Use the encoder that the adapter was made with.",
            )
        if adapter.feature != "image_embeds" and getattr(output, "styleloom_subtracted", None):
            raise StyleLoomError(
                f"{name} had content subtracted, and {adapter.name} is a {adapter.kind} adapter: it reads the patch "
                "features, which have no counterpart among texts and were left as they are",
                "a base IP-Adapter, or patch features",
                "Connect the picture as it was, and an encoded picture of the unwanted content to negative; or use a "
                "base IP-Adapter.",
            )
    device = comfy.model_management.get_torch_device()
    return torch.cat([getattr(output, adapter.feature) for output in outputs]).to(device, torch.float32)


def with_embeds(output, embeds: torch.Tensor, note: str):
    """A copy with another `image_embeds`; all else is shared."""
    changed = copy.copy(output)
    changed["image_embeds"] = embeds
    changed["styleloom_subtracted"] = note
    return changed
