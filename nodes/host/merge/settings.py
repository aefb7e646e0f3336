"""What a ZipRank merge is asked for: the inputs of the node ZipRank Merge, with their types and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MergeSettings:
    """The inputs of the node beside the two LoRAs, the model and the clip. Names and defaults are the node's.

    Attributes:
        separation: γ in [0, 1]; 0 is the sum of both LoRAs, 1 keeps them apart as far as possible.
        content_strength, style_strength: scale the LoRAs before the merge.
        prior: name of the layer prior. custom_prior: JSON text, for the prior "custom".
        max_rank: largest rank of a merged layer; 0 keeps all.
        keep_strength: raise the masks where the LoRAs have weakened each other.
        solver: "masks" or "router"; mode calibrated.
        content_prompt, style_prompt: one prompt a line; modes calibrated and train, as is all below.
        content_latents, style_latents: the host's LATENT of real pictures, or None.
        calibration_steps: noise levels (calibrated), or steps of the pictures that the LoRAs make (train).
        size: side in pixels of those pictures.
        seed: 0 to 2^64 − 1.
        steps, learning_rate, cycle_weight, prior_weight: mode train.
    """

    separation: float = 0.7
    content_strength: float = 1.0
    style_strength: float = 1.0
    prior: str = "soft"
    max_rank: int = 0
    content_prompt: str = ""
    style_prompt: str = ""
    steps: int = 60
    learning_rate: float = 0.01
    content_latents: dict[str, torch.Tensor] | None = None
    style_latents: dict[str, torch.Tensor] | None = None
    cycle_weight: float = 0.0
    seed: int = 0
    custom_prior: str = ""
    keep_strength: bool = True
    solver: str = "masks"
    calibration_steps: int = 4
    size: int = 1024
    prior_weight: float = 0.1

    @classmethod
    def of(cls, given: MergeSettings | Mapping) -> MergeSettings:
        """From the inputs that a node was given; what is left out has its default."""
        return given if isinstance(given, cls) else cls(**given)

    @property
    def strengths(self) -> tuple[float, float]:
        """Of content and style."""
        return (self.content_strength, self.style_strength)

    @property
    def prompts(self) -> tuple[str, str]:
        """Of content and style, as they were written."""
        return (self.content_prompt, self.style_prompt)

    @property
    def latents(self) -> tuple[dict | None, dict | None]:
        """Of content and style, as they were given."""
        return (self.content_latents, self.style_latents)
