"""How strong a LoRA of a branch is at a sigma: its strength, its window and the host's hook keyframes."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.hooks
import torch


@dataclass(frozen=True)
class BranchLoRA:
    """A LoRA for one branch of guidance.

    Attributes:
        lora: LORA_MODEL.
        strength: Scales the change.
        start_percent, end_percent: The part of sampling in which it acts, 0 to 1.
        keyframes: The host's HookKeyframeGroup, or None; its strength multiplies.
        masks: Where it acts, each (pictures or frames, height, width); they multiply. None: everywhere.
        text_tokens: With a mask, what has no place in the picture gets "none" of it or the "whole".
    """

    lora: dict
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    keyframes: comfy.hooks.HookKeyframeGroup | None = None
    masks: tuple[torch.Tensor, ...] = ()
    text_tokens: str = "none"

    @property
    def acts(self) -> bool:
        return self.strength != 0 and self.start_percent < self.end_percent


class Schedule(comfy.hooks.HookKeyframeGroup):
    """The strength of one LoRA as sampling goes on; also what the host asks where a part of it runs as a weight hook.

    Like a conditioning's own range, the window is closed: it acts while sigma_end <= sigma <= sigma_start.
    """

    def __init__(self, entry: BranchLoRA):
        super().__init__()
        self._entry = entry
        self._keyframes = entry.keyframes.clone() if entry.keyframes is not None else None
        self._range: tuple[float, float] | None = None
        self._factor = 1.0

    @property
    def constant(self) -> bool:
        """No sigma has to be looked at."""
        return (self._entry.start_percent <= 0 and self._entry.end_percent >= 1) and not self._keyframes

    @property
    def strength(self) -> float:
        """What the LoRA's own strength is to be multiplied with."""
        return self._factor

    def __bool__(self) -> bool:
        return True

    def clone(self) -> Schedule:
        return self  # hooks of one run share it, as the host's own clones share their keyframes

    def reset(self) -> None:
        self._factor = 1.0
        if self._keyframes is not None:
            self._keyframes.reset()

    def initialize_timesteps(self, model) -> None:
        sigma = model.model_sampling.percent_to_sigma
        self._range = (float(sigma(self._entry.start_percent)), float(sigma(self._entry.end_percent)))
        if self._keyframes is not None:
            self._keyframes.initialize_timesteps(model)

    def prepare_current_keyframe(self, curr_t, transformer_options) -> bool:
        """Move to a sigma; True where the strength changed."""
        before = self._factor
        if self._keyframes is not None:
            self._keyframes.prepare_current_keyframe(curr_t, transformer_options)
        if not self.constant:
            start, end = self._range
            inside = bool(end <= curr_t) and bool(curr_t <= start)  # in the sigma's own dtype, as the host compares
            self._factor = (self._keyframes.strength if self._keyframes is not None else 1.0) if inside else 0.0
        return self._factor != before
