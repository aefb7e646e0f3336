"""The host's INT8 linear layers, as its loader makes them, and feed-forwards that compute them as newer hosts do."""

from __future__ import annotations

import comfy.ops
import torch


def int8_linear(linear: torch.nn.Linear, scale: float = 1.0) -> torch.nn.Module:
    """The same layer, its weight times `scale` in INT8 with one scale for the tensor, from a state dict of the
    published form. What it multiplies with is `weight.dequantize()`."""
    weight = linear.weight.detach().float() * scale
    step = weight.abs().amax() / 127
    state = {
        "weight": (weight / step).round().to(torch.int8),
        "weight_scale": step,
        "comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8),
    }
    if linear.bias is not None:
        state["bias"] = linear.bias.data
    kind = comfy.ops.mixed_precision_ops(compute_dtype=linear.weight.dtype).Linear
    made = kind(linear.in_features, linear.out_features, linear.bias is not None)
    made.load_state_dict(state, strict=False)
    return made


class FusedFeedForward(torch.nn.Sequential):
    """up, activation, down, where the host's `linear_input_act` makes the last two of them one: what Wan, LTX and
    MiniMax do. The names of the layers are those of a Sequential, so a LoRA's keys fit."""

    def __init__(self, feed_forward: torch.nn.Sequential, act: str = "swiglu"):
        super().__init__(*feed_forward)
        self.act = act

    def forward(self, x):
        return comfy.ops.linear_input_act(self[2], self[0](x), self.act)
