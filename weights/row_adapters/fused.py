"""What a host computes in one kernel with a linear layer, computed in its parts.

A host may hand a layer the input before its activation, and a residual to which the output is added:

    residual + residual_scale * linear(act(x))

A term needs act(x), which is the input of the weight, and changes what the weight makes of it. Both follow ComfyUI's
own unfused path (`linear_input_act` of 0.30; the keywords of `Linear.forward` of later ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F


class UnknownCall(Exception):
    """A layer with terms is called in a way that is not known here, so that its real input is not known either."""

    def __init__(self, layer: str, found: str):
        super().__init__(f"{layer or 'a layer'} is called with {found}")


@dataclass(frozen=True)
class Fused:
    """The parts of one such call.

    Attributes:
        input_act: "gelu_tanh", "swiglu" (the first half of the last axis is the gate), "rms_norm", or None.
        act_weight: Of "rms_norm": the weight (in,), the norm itself, or None.
        act_eps: Of "rms_norm" with a weight.
        residual: As the output, or None.
        residual_scale: Broadcast over the output, or None for 1.
    """

    input_act: str | None = None
    act_weight: torch.Tensor | torch.nn.Module | None = None
    act_eps: float = 0.0
    residual: torch.Tensor | None = None
    residual_scale: torch.Tensor | float | None = None

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """The input of the weight; x itself where there is no activation."""
        if self.input_act == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if self.input_act == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)
        if self.input_act == "rms_norm":
            weight = self.act_weight
            if isinstance(weight, torch.nn.Module):
                return weight(x)
            return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.device, x.dtype), self.act_eps)
        return x

    def after(self, y: torch.Tensor) -> torch.Tensor:
        """The call's result, from what the layer made of `before`."""
        if self.residual is None:
            return y
        if isinstance(self.residual_scale, torch.Tensor):
            return torch.addcmul(self.residual, y, self.residual_scale)
        return self.residual + (y if self.residual_scale is None else y * self.residual_scale)


ACTS = (None, "gelu_tanh", "swiglu", "rms_norm")
NAMES = ("input_act", "act_weight", "act_eps", "residual", "residual_scale")


def fused(layer: str, given: Mapping[str, object]) -> Fused:
    """The parts of a call from its keywords; those that are None count as absent.

    Args:
        layer: Its name, for the error.

    Raises:
        UnknownCall: a keyword or an activation that is not known.
    """
    given = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise UnknownCall(layer, f"the keyword {', '.join(unknown)}")
    parts = Fused(**given)
    if parts.input_act not in ACTS:
        raise UnknownCall(layer, f"the activation {parts.input_act}")
    return parts
