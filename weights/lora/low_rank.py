"""The one low-rank form that a LoRA has inside the pack, from the reader to the writer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

Slice = tuple[int, int] | None  # (first channel, number of channels), or all of them


@dataclass(frozen=True, eq=False)
class LowRank:
    """`scale · up @ down` is the change of one weight, flattened behind its first axis.

    Attributes:
        down: (rank, in·kernel…), a float dtype.
        up: (out, rank), of the same dtype.
        kernel: What follows (out, in) in the weight's shape; () for a linear layer.
        scale: alpha / rank and strengths that are not multiplied into `up` yet. 1 for all that comes out of a merge or
            a predictor; the reader and the row terms keep it apart, so that half precision factors stay as they are.
        outputs, inputs: The output or input channels of the weight that the change is for, where it is for a part.
    """

    down: torch.Tensor
    up: torch.Tensor
    kernel: tuple[int, ...] = ()
    scale: float = 1.0
    outputs: Slice = None
    inputs: Slice = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in·kernel…)."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in, kernel…) of the weight, or of the part of it, that the change is for."""
        out, columns = self.shape
        return (out, columns // math.prod(self.kernel), *self.kernel)

    def factors(self, strength: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) to compute with: float32, or float64 where they are; `scale` and `strength` multiplied into
        `up`."""
        down, up = (t if t.dtype == torch.float64 else t.float() for t in (self.down, self.up))
        strength = strength * self.scale
        return down, up if strength == 1 else up * strength
