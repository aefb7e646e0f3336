"""What a layer does to its input, as far as a change of its weight concerns it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Layer:
    """A linear layer, a convolution or a norm, without its weight.

    Attributes:
        kind: "linear", "conv" or "norm".
        shape: The weight's logical shape, also where a quantised layer stores another.
        axis: The axis of the output that the weight's first axis makes: the channels.
        bias: The layer adds one.
        apply: (input, weight of this shape) → what the layer makes of them, without a bias.
    """

    kind: str
    shape: tuple[int, ...]
    axis: int
    bias: bool
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    groups: int = 1
    conv: Callable | None = None
    stride: tuple = ()
    padding: tuple | str = ()
    dilation: tuple = ()

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    def convolve(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """With this layer's stride, padding and dilation."""
        return self.conv(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def pointwise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Over the channels alone; `weight` is (out, in)."""
        if self.kind == "linear":
            return F.linear(x, weight)
        return self.conv(x, weight.reshape(*weight.shape[:2], *(1 for _ in self.kernel)))

    def columns(self) -> int:
        return math.prod(self.shape[1:])


def layer_of(module: torch.nn.Module) -> Layer | None:
    """The layer that a module is, or None where its kind is not known.

    Sizes come from what the module says of itself: a quantised weight may have another shape.
    """
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        if module.padding_mode != "zeros":
            return None
        kernel = tuple(module.kernel_size)
        layer = Layer(
            "conv",
            (module.out_channels, module.in_channels // module.groups, *kernel),
            1,
            bias,
            lambda x, weight: layer.convolve(x, weight),
            module.groups,
            _CONVOLUTIONS[len(kernel)],
            module.stride,
            module.padding,
            module.dilation,
        )
        return layer
    if isinstance(module, torch.nn.LayerNorm):
        shape, eps = tuple(module.normalized_shape), module.eps
        return Layer("norm", shape, -1, bias, lambda x, weight: F.layer_norm(x, shape, weight, None, eps))
    if isinstance(module, torch.nn.RMSNorm):
        shape, eps = tuple(module.normalized_shape), module.eps
        return Layer("norm", shape, -1, False, lambda x, weight: F.rms_norm(x, shape, weight, eps))
    if isinstance(module, torch.nn.GroupNorm):
        groups, eps = module.num_groups, module.eps
        return Layer(
            "norm", (module.num_channels,), 1, bias, lambda x, weight: F.group_norm(x, groups, weight, None, eps)
        )
    inside, outside = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inside, int) and isinstance(outside, int):  # also the linear layers of quantised formats
        return Layer("linear", (outside, inside), -1, bias, F.linear)
    return None
