"""What the host's models need so that a gradient can go through them: weights that autograd may save, additions that
leave what it has saved alone, and less memory."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from .masked_lora import MaskedLoRA


class AddOutOfPlace(TorchFunctionMode):
    """While it is entered and gradients are on, `a += b` makes a new tensor.

    The host's Flux and FLUX.2 blocks write `img += …` into a tensor that autograd has saved for the backward pass, or
    into the input of a checkpointed block, from which that block is computed again. The
    operator binds the name to the result either way, and `a[…] += b` puts the sum back into `a`, so what follows is the
    same. torch sees the operator as a call of `add_`; a call that is written so (`sim.add_(mask)`) throws its result
    away and stays in place: the instruction of the caller tells them apart.

    torch leaves such a mode for the time of a backward pass, so `Checkpointing` enters it again.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.add_ and not kwargs and len(args) == 2 and torch.is_grad_enabled():
            caller = sys._getframe(1)
            if _is_operator(caller.f_code, caller.f_lasti):
                return torch.add(*args).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=256)
def _is_operator(code: CodeType, at: int) -> bool:
    """Whether the instruction at that offset is `+=`."""
    for instruction in dis.get_instructions(code):
        if instruction.offset == at:
            return instruction.opname == "INPLACE_ADD" or instruction.argrepr == "+="  # Python 3.10, and later ones
    return False


def training_clone(model):
    """A clone whose weights autograd may use: the host's deep copy where the weights were loaded in inference mode and
    the host can load them again; else a clone whose layers work on copies."""
    frozen = any(p.is_inference() for p in model.model.parameters())
    if not frozen:
        return model.clone()
    if "force_deepcopy" in inspect.signature(model.clone).parameters and model.cached_patcher_init is not None:
        return model.clone(force_deepcopy=True)
    clone = model.clone()
    for name, module in clone.model.named_modules():
        if hasattr(module, "weight_function") and hasattr(clone, "add_weight_wrapper"):
            for part in ("weight", "bias"):
                if getattr(module, part, None) is not None:
                    clone.add_weight_wrapper(f"{name}.{part}", _copied)
    return clone


class _Copied:
    """A weight function that hands on a copy, which autograd may save."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()

    def move_to(self, device) -> int:
        return 0

    def passive_memory_usage(self) -> int:
        return 0


_copied = _Copied()


def without_copies(model) -> None:
    """Takes the weight functions of `training_clone` off the layers, which the model that was given shares."""
    for module in model.model.modules():
        for name in ("weight_function", "bias_function"):
            functions = getattr(module, name, None)
            if functions and _copied in functions:
                setattr(module, name, [function for function in functions if function is not _copied])


class Checkpointing:
    """Gradient checkpointing around the blocks of a model, while the block is entered: a block is computed again in
    the backward pass, with the rows and masks that it had at first.

    Args:
        model: MODEL.
        lora: In its layers.
    """

    def __init__(self, model, lora: MaskedLoRA, enabled: bool = True):
        self._lora, self._changed = lora, []
        self._modules = list(_blocks(model.model.diffusion_model)) if enabled else []

    def __enter__(self) -> Checkpointing:
        for module in self._modules:
            self._changed.append((module, module.__dict__.get("forward")))
            module.forward = self._checkpointed(module.forward)
        return self

    def __exit__(self, *exc) -> None:
        while self._changed:
            module, before = self._changed.pop()
            if before is None:
                del module.forward
            else:
                module.forward = before

    def _checkpointed(self, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            then = self._lora.state()

            def again(*args, **kwargs):
                now = self._lora.state()
                self._lora.back_to(then)
                try:
                    with AddOutOfPlace():
                        return forward(*args, **kwargs)
                finally:
                    self._lora.back_to(now)

            return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=False, **kwargs)

        return run


def _blocks(net: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The parts of a net that it calls itself: its blocks, in whatever lists they stand."""
    for child in net.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)):
            yield from _blocks(child)
        else:
            yield child
