"""LoRA, and on convolutions LoCon with or without a Tucker core.

ΔW = alpha/rank · up · down; with a core `mid`: ΔW = alpha/rank · up · (mid ×₂ down), down and up pointwise.
"""

from __future__ import annotations

import torch

from ...row_adapters.terms import ConvLowRank, Term
from ..low_rank import LowRank
from .base import ALPHA, AddedKind, NoTerm, Parts, Place, columns, multiplied_out, size, weight_only, wide


def _half(side: str, letter: str) -> str:
    """What the keys of a half end in: kohya and DiffSynth (`lora_down`), diffusers and PEFT (`lora_A`, also with the
    adapter's own name behind it: `lora_A.default`), older diffusers."""
    return (
        rf"\.lora_(?:{side}|{letter})(?:\.[^.]+)?\.weight|\.lora_{letter}"
        rf"|\.lora(?:_linear_layer)?\.{side}\.weight|_lora\.{side}\.weight"
    )


class LoRAKind(AddedKind):
    """down (rank, in, *kernel), up (out, rank, 1…), mid (rank, rank, *kernel) or none.

    `reshape_weight` is the size to which the host enlarges the layer first, with zeros (FLUX control LoRAs).
    """

    name = "LoRA"
    endings = {
        "down": _half("down", "A"),
        "up": _half("up", "B"),
        "mid": r"\.lora_mid\.weight",
        "reshape_weight": r"\.reshape_weight",
    } | ALPHA
    needed = ("down", "up")
    host_name = "lora"
    # What `down` and `up` are called in the files that the pack writes: kohya's names, which every tool knows for
    # convolutions too, and those of PEFT.
    kohya = ("lora_down.weight", "lora_up.weight")
    peft = ("lora_A.weight", "lora_B.weight")
    host_order = ("up", "down", "alpha", "mid", "dora", "reshape_weight")

    def problem(self, parts: Parts) -> tuple[str, str] | None:
        down, up, mid = parts["down"], parts["up"], parts.get("mid")
        given = f"down is {size(down)} and up is {size(up)}"
        if down.ndim < 2 or up.ndim < 2:
            return given, "matrices or convolutions"
        inner = down.shape[0]
        if mid is not None:
            if mid.ndim < 2 or mid.shape[1] != inner or columns(up) != mid.shape[0]:
                return f"mid is {size(mid)} for down {size(down)} and up {size(up)}", "(rank, rank, kernel)"
        elif columns(up) != inner:
            return given, "(rank, in) and (out, rank) with one rank"
        return None

    def rank(self, parts: Parts) -> int:
        return parts["down"].shape[0]

    def shapes(self, parts: Parts) -> list[tuple[int, int | None]]:
        pixels = 1 if parts.get("mid") is None else columns(parts["mid"][0])
        return [(parts["up"].shape[0], columns(parts["down"]) * pixels)]

    def kernel(self, parts: Parts) -> tuple[int, ...]:
        return tuple(parts["down" if parts.get("mid") is None else "mid"].shape[2:])

    def low_rank(self, parts: Parts) -> LowRank:
        """Without a core in the file's own dtype and memory, with alpha/rank as the scale: a whole file in float32
        would be twice its size, and a merge widens one layer at a time."""
        down, up, scale = parts["down"].flatten(1), parts["up"].flatten(1), self.scale(parts)
        if parts.get("mid") is not None:
            down = torch.einsum("oj...,ji->oi...", wide(parts["mid"]), wide(down)).flatten(1)
            return LowRank(down, wide(up) * scale, self.kernel(parts))
        if down.dtype != up.dtype or not down.is_floating_point():
            down, up = wide(down), wide(up)
        return LowRank(down, up, self.kernel(parts), scale)

    def change(self, parts: Parts) -> torch.Tensor:
        down, up = self.low_rank(parts).factors()
        return up @ down

    def row_form(self, parts: Parts, place: Place) -> Term | LowRank:
        weight_only(self, place)
        if parts.get("reshape_weight") is not None:
            raise NoTerm("a LoRA that enlarges the layer")
        layer, scale = place.layer, self.scale(parts)
        down, mid, up = parts["down"], parts.get("mid"), parts["up"].flatten(1)
        if place.swap is not None:
            up = place.swap(up)
        if layer.kind == "linear":
            down = down.flatten(1)
            if mid is not None:  # a core over one pixel
                down = wide(mid.flatten(1)) @ wide(down)
            return LowRank(down, up, (), scale, place.outputs(), place.inputs())
        if place.part is not None:
            raise NoTerm("a part of a convolution")
        if layer.groups > 1:
            return multiplied_out(self, parts, place)
        return ConvLowRank(layer, place.source, down, up, mid, scale, place.dtype)
