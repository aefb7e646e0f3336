"""Which image encoder a file holds, and the module that runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import StyleLoomError
from . import dinov3, siglip2
from .file_recognition import describe
from .tower_parts import Attention, OnBlock, check_shapes, plain_attention

PRECISIONS = ("bf16", "fp8", "fp32")
_FP8 = torch.float8_e4m3fn
_KINDS = {"siglip2": siglip2, "dinov3": dinov3}
_MODULES = {"siglip2": siglip2.SigLIP2Vision, "dinov3": dinov3.DINOv3Vision}
_NAMES = {"siglip2": "SigLIP2", "dinov3": "DINOv3"}
_PUBLISHED = {"siglip2": "SigLIP2-G384/model.safetensors", "dinov3": "DINOv3-7B/model.safetensors"}


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype that a tower of this precision computes in, and that its pixels must have."""
    _check_precision(precision)
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise StyleLoomError(
            f"Unknown precision {precision!r} for the image encoders.",
            "one of " + ", ".join(PRECISIONS),
            "Choose bf16, which the published encoders are used in.",
        )


def recognise_tower(
    shapes: Mapping[str, Sequence[int]], file: str = "", expected: str | None = None
) -> tuple[str, siglip2.SigLIP2Config | dinov3.DINOv3Config]:
    """Tells from names and shapes which encoder a file holds, and checks every one of them.

    Args:
        shapes: tensor name → shape, as in the file's header.
        file: its name, for messages.
        expected: "siglip2" or "dinov3" where only that one will do.

    Returns:
        ("siglip2" or "dinov3", its sizes); sizes other than the published ones are taken if consistent.

    Raises:
        StyleLoomError: neither encoder, the other one, or tensors that are missing, left over or misshapen.
    """
    name = file or "The file"
    if "embeddings.patch_embedding.weight" in shapes:
        kind = "siglip2"
    elif "embeddings.cls_token" in shapes and "embeddings.patch_embeddings.weight" in shapes:
        kind = "dinov3"
    else:
        wanted = " or ".join(_PUBLISHED[kind] for kind in ([expected] if expected else _KINDS))
        raise StyleLoomError(
            f"{name} is no image encoder of Image-to-LoRA; it seems to be {describe(shapes)}.",
            f"{wanted}, from DiffSynth-Studio/General-Image-Encoders",
            "Choose that file; README says where it comes from and where it goes.",
        )
    if expected is not None and kind != expected:
        raise StyleLoomError(
            f"{name} holds the {_NAMES[kind]} encoder.",
            f"the {_NAMES[expected]} encoder, {_PUBLISHED[expected]}",
            "Choose the other file: the two encoders' inputs seem to be swapped.",
        )
    config = _KINDS[kind].config_from_shapes(shapes, file)
    check_shapes(shapes, _KINDS[kind].key_shapes(config), file, _NAMES[kind])
    return kind, config


def build_tower(
    state_dict: Mapping[str, torch.Tensor],
    file: str,
    precision: str,
    operations=nn,
    device: torch.device | str | None = None,
    attention: Attention = plain_attention,
) -> nn.Module:
    """Makes the encoder around the tensors of a file, without a second copy of them.

    Precision "bf16" and "fp32" keep the tensors as they are in the file and name the dtype to compute in
    (`compute_dtype`); casting `operations` cast each weight when it is used. With `torch.nn`, which does not
    cast, tensors of another dtype are converted here. "fp8" stores the matrices of the blocks as
    float8_e4m3fn, half of bf16, and needs casting `operations`. Each is multiplied by the power of two that
    brings its largest value to 224…448, the top of that format, which the forward pass undoes on the
    layer's input: nothing saturates, and small values keep about the bits of large ones.

    Args:
        state_dict: tensor name → tensor, memory-mapped ones welcome; left untouched.
        file: its name, for messages.
        precision: one of PRECISIONS.
        operations: namespace with Linear, LayerNorm, Conv2d.
        device: where to move the weights; None leaves them where they are.
        attention: as in `tower_parts.plain_attention`.

    Returns:
        `SigLIP2Vision` or `DINOv3Vision`, in eval mode, its parameters without gradients.

    Raises:
        StyleLoomError: as `recognise_tower`; tensors that are not floats or not finite; fp8 with `torch.nn`.
    """
    _check_precision(precision)
    kind, config = recognise_tower({key: tuple(tensor.shape) for key, tensor in state_dict.items()}, file)
    odd = [key for key, tensor in state_dict.items() if not tensor.dtype.is_floating_point]
    if odd:
        raise StyleLoomError(
            f"{file or 'The file'} has {len(odd)} tensors that are not floating point, {odd[0]} for one.",
            "bf16, fp16, fp32 or fp8 weights",
            f"Choose the published {_PUBLISHED[kind]}.",
        )
    if precision == "fp8" and operations is nn:
        raise StyleLoomError(
            "fp8 storage was asked of layers that do not cast their weights.",
            "layers that cast, such as the host's",
            'Choose precision "bf16".',
        )
    # Under no dtype of their own the host's layers keep that of the file, in VRAM as well.
    tower = _MODULES[kind](config, operations=operations, attention=attention, device="meta").requires_grad_(False)
    tensors, scales = dict(state_dict), {}
    if operations is nn:
        tensors = {key: tensor.to(compute_dtype(precision)) for key, tensor in tensors.items()}
    if precision == "fp8":
        for key in _block_matrices(kind, tensors):
            tensors[key], scales[key] = to_fp8(tensors[key], key, file)
    tower.load_state_dict(tensors, strict=True, assign=True)
    for key, scale in scales.items():
        tower.get_submodule(key.removesuffix(".weight")).storage_scale = scale
    if device is not None:
        tower.to(device)
    return tower.eval()


def _block_matrices(kind: str, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    blocks = _KINDS[kind].BLOCKS
    return [key for key, tensor in tensors.items() if key.startswith(blocks) and tensor.ndim == 2]


def to_fp8(weight: torch.Tensor, key: str, file: str = "") -> tuple[torch.Tensor, float]:
    """Stores a matrix as float8_e4m3fn: (fp8 of weight·2^k, 2^-k), with k such that the largest value is in 224…448.

    A matrix that is fp8 already is kept, with scale 1.

    Raises:
        StyleLoomError: the matrix has values that are not finite.
    """
    if weight.dtype == _FP8:
        return weight, 1.0
    weight = weight.float()
    largest = weight.abs().max().item()
    if not math.isfinite(largest):
        raise StyleLoomError(
            f"{file or 'The file'}: {key} has values that are not finite.",
            "weights that are numbers",
            "The file is damaged: download it again.",
        )
    # 448 is 0.875·2^9, so with the largest value as m·2^e (0.5 ≤ m < 1) the power is 9 - e, or one less.
    mantissa, exponent = math.frexp(largest)
    power = 0 if largest == 0 else (9 if mantissa <= 0.875 else 8) - exponent
    return (weight * 2.0**power).to(_FP8), 2.0**-power


@torch.no_grad()
def encode(tower: nn.Module, pixel_values: torch.Tensor, on_block: OnBlock | None = None) -> torch.Tensor:
    """Runs the encoder on prepared pictures, (B, 3, side, side) → (B, hidden), and checks what comes out.

    Raises:
        StyleLoomError: the embedding has values that are not finite.
    """
    embedding = tower(pixel_values, on_block=on_block)
    if not torch.isfinite(embedding).all():
        raise StyleLoomError(
            f"{type(tower).__name__} gave an embedding with values that are not numbers.",
            "finite values",
            "Its weights are damaged, or of another model: download the encoder file again.",
        )
    return embedding
