"""Sets every parameter and buffer of a host module to seeded values that an activation survives.

The host builds its layers on uninitialised memory. Here each tensor gets values from the seed and its own name.
Matrices keep the size of what passes through (entries of variance gain² / fan-in), norms are near one, biases are
small; the few names where a trained net differs from that are given by the caller as rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import torch

from .seeded import normal

# (regular expression on the tensor's name, function of its shape that returns (std, mean))
Rule = tuple[str, Callable[[tuple[int, ...]], tuple[float, float]]]


def gain(g: float) -> Callable[[tuple[int, ...]], tuple[float, float]]:
    """Entries of variance g² / fan-in."""
    return lambda shape: (g / math.sqrt(math.prod(shape[1:])), 0.0)


def constant(std: float, mean: float = 0.0) -> Callable[[tuple[int, ...]], tuple[float, float]]:
    """Entries of a fixed size, whatever the shape."""
    return lambda shape: (std, mean)


def _default(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("logit_scale"):
        return 0.0, 4.6
    if len(shape) >= 2:
        return gain(1.0)(shape)
    if name.endswith(("weight", "scale")):
        return 0.05, 1.0
    return 0.02, 0.0


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int, rules: Iterable[Rule] = (), prefix: str = "",
         keep_buffers: Callable[[str], bool] = lambda name: False) -> torch.nn.Module:
    """Fills all parameters of `module` in place; the first matching rule wins.

    Buffers are refused unless `keep_buffers` vouches that their class sets them itself: a buffer made with
    `torch.empty` would otherwise be the one thing in a model that differs from run to run.
    """
    rules = [(re.compile(pattern), scale) for pattern, scale in rules]
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        std, mean = next((scale(shape) for pattern, scale in rules if pattern.search(name)), None) or _default(
            name, shape)
        parameter.copy_(normal(seed, prefix + name, shape, std, mean))
        parameter.requires_grad_(False)
    for name, buffer in module.named_buffers():
        if buffer.numel() and not keep_buffers(name):
            raise RuntimeError(f"buffer {name} {tuple(buffer.shape)} of {type(module).__name__} has no seeded value")
    return module
