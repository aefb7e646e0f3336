"""How strong a LoRA of a branch is at a sigma: its strength, its window and the host's hook keyframes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.hooks
import torch

# Samplers go through their own units, and come back with a sigma that is a rounding off.
_NEAR = 1e-4


@dataclass(frozen=True)
class StepWindow:
    """Steps `first` to `last` of `of`, counted from 1, both inside. With another number of steps: those whose middle
    lies in the same share of them."""

    first: int
    last: int
    of: int

    def inside(self, count: int) -> range:
        """Of `count` steps, counted from 0."""
        within = [
            i
            for i in range(count)
            if 2 * (self.first - 1) * count <= (2 * i + 1) * self.of < 2 * self.last * count
        ]
        return range(within[0], within[-1] + 1) if within else range(0)


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """Which step of a schedule a model call belongs to, counted from 0: the last that begins at or before this sigma.

    sigmas: of all steps, and where the last one ends; falling, or rising where a picture is turned into noise.
    """
    rising = sigmas[-1] > sigmas[0]
    begun = [s <= sigma * (1 + _NEAR) if rising else s * (1 + _NEAR) >= sigma for s in sigmas[:-1]]
    return max(0, sum(begun) - 1)


@dataclass(frozen=True)
class BranchLoRA:
    """A LoRA for one branch of guidance.

    Attributes:
        lora: LORA_MODEL.
        strength: Scales the change.
        start_percent, end_percent: The part of sampling in which it acts, 0 to 1.
        keyframes: The host's HookKeyframeGroup, or None; its strength multiplies.
        steps: A window in steps, beside the one in parts of the noise schedule; None: all of them.
        patches: The host's patches that were read already, in place of `lora`; None: `lora` is to be read.
        name: What reports call it, for example its file.
        strength_clip: Its strength on a text encoder, for whoever can still apply that; None: as `strength`.
        masks: Where it acts, each (pictures or frames, height, width); they multiply. None: everywhere.
        text_tokens: With a mask, what has no place in the picture gets "none" of it or the "whole".
    """

    lora: dict
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    keyframes: comfy.hooks.HookKeyframeGroup | None = None
    steps: StepWindow | None = None
    patches: Mapping[Any, Any] | None = None
    name: str = ""
    strength_clip: float | None = None
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
        self._sigmas: list[float] = []
        self._steps = range(0)
        self._factor = 1.0

    @property
    def constant(self) -> bool:
        """No sigma has to be looked at."""
        whole = self._entry.start_percent <= 0 and self._entry.end_percent >= 1
        return whole and not self._keyframes and self._entry.steps is None

    def of_steps(self, sigmas: torch.Tensor) -> None:
        """Tell it the sigmas of all steps, and where the last one ends; a run may be a part of them."""
        if self._entry.steps is not None:
            self._sigmas = sigmas.tolist()
            self._steps = self._entry.steps.inside(len(self._sigmas) - 1)

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
            if inside and self._entry.steps is not None:
                if not self._sigmas:  # a loop that does not go through the guider's `sample`
                    self.of_steps(transformer_options["sample_sigmas"])
                inside = step_of(float(curr_t), self._sigmas) in self._steps
            self._factor = (self._keyframes.strength if self._keyframes is not None else 1.0) if inside else 0.0
        return self._factor != before


def strengths_by_step(entry: BranchLoRA, model, sigmas: torch.Tensor, of: torch.Tensor) -> list[float]:
    """How strong a LoRA is in each step of a run.

    Args:
        model: MODEL.
        sigmas: Of the steps that run, and where the last one ends.
        of: The same of all steps that `sigmas` is a part of.
    """
    schedule = Schedule(entry)
    schedule.reset()
    schedule.initialize_timesteps(model.model)
    schedule.of_steps(of)
    made = []
    for sigma in sigmas[:-1]:
        if not schedule.constant:
            schedule.prepare_current_keyframe(sigma, {"sample_sigmas": sigmas})
        made.append(entry.strength * (1.0 if schedule.constant else schedule.strength))
    return made
