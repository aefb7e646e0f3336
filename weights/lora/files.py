"""LoRA files: is it one, and writing one."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from ..errors import StyleLoomError
from ..tensor_file import write_tensor_file
from .keys import key_part

PRECISIONS = {"as it is": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

def check_lora(tensors: Mapping[str, torch.Tensor], file: str) -> None:
    """Raise StyleLoomError where the tensors of a file are no adapter of any kind, are none at all, or hold NaN or
    infinity."""
    strange = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    parts = [(key_part(key) or ("", ""))[1] for key in tensors if isinstance(key, str)]
    adapter = [part for part in parts if part not in ("", "alpha")]
    if strange or not adapter or len(adapter) * 2 < len(tensors) - parts.count("alpha"):
        first = ", ".join(list(map(str, tensors))[:3]) or "none"
        raise StyleLoomError(
            f"{file}: this is no LoRA: {len(adapter)} of its {len(tensors)} tensors are part of one (first: {first})",
            "a LoRA, LoCon, LoHa, LoKr, OFT or GLoRA file",
            "Choose a LoRA. A checkpoint or diffusion model belongs into its own loader.",
        )
    check_finite(tensors, file)


def check_finite(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise StyleLoomError where a tensor holds NaN or infinity; `name` says whose it is."""
    for key, value in tensors.items():
        # One pass that keeps nothing: a sum is finite unless a part is not, or the parts are huge.
        if (
            value.is_floating_point()
            and not bool(value.float().sum().isfinite())
            and not bool(value.float().isfinite().all())
        ):
            raise StyleLoomError(
                f"{name}: the tensor {key!r} holds NaN or infinity",
                "finite numbers",
                "The training of this LoRA diverged, or the file is damaged: use an earlier save of "
                "it, or download it again.",
            )


def save_lora(
    path: str | os.PathLike, lora: Mapping[str, torch.Tensor], metadata: Mapping[str, str], precision: str = "as it is"
) -> None:
    """Write a LoRA that appears whole or not at all.

    Args:
        path: of the new .safetensors file.
        lora: LORA_MODEL, tensors in LoRA-file keys; floats are cast, everything else stays, as do alphas: a half
            precision number cannot hold every rank (bf16 only every second one above 256).
        metadata: strings for the header.
        precision: one of `PRECISIONS`.

    Raises:
        StyleLoomError: an empty LoRA; values that the precision cannot hold.
    """
    if not lora:
        raise StyleLoomError("the LoRA to save is empty", "at least one tensor", "Look at the node that makes it.")
    dtype = PRECISIONS[precision]
    tensors = {}
    for key, value in lora.items():
        kept = dtype is None or not value.is_floating_point() or key.endswith(".alpha")
        cast = value if kept else value.to(dtype)
        if cast.is_floating_point() and not bool(cast.float().isfinite().all()):
            raise StyleLoomError(
                f"{key!r} has values that are not finite in {precision}",
                "finite numbers",
                "Save as bf16 or fp32, or lower the strength that made this LoRA.",
            )
        tensors[key] = cast
    write_tensor_file(path, tensors, dict(metadata))
