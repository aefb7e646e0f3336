"""Learning the masks of a merge through the diffusion model.

One batched pass of the model makes every term of a step: the merged LoRA on a content and on a style picture, held
against what each LoRA alone makes of them. Those teachers do not depend on the masks, so they are computed once for a
few noised pictures and kept. With the Constyle cycle, two more rows in the same pass add the other concept (with the
merged network), and a second pass takes it away again with the LoRA of the picture's own concept: two passes with
gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import comfy.conds
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from ....weights.merge.objective import MAX_MASK, Best, MaskVector, prior_loss
from ....weights.row_adapters.layouts import layouts_of
from ....weights.row_adapters.masked import CONTENT, MERGED, STYLE
from ....weights.row_adapters.rows import UnknownRows
from .gradients import AddOutOfPlace
from .masked_lora import MaskedLoRA


@dataclass
class Lessons:
    """What is trained on.

    Attributes:
        latents: (content pictures, style pictures) in the model's own latent space.
        conds: The model conditionings (one row) of each content picture and of each style picture.
        both: Those of both prompts together, by (content picture, style picture); for the cycle.
        count: Noised pictures of each concept.
        seed: Of the noise.
    """

    latents: tuple[torch.Tensor, torch.Tensor]
    conds: tuple[Sequence[dict], Sequence[dict]]
    both: Mapping[tuple[int, int], dict]
    count: int
    seed: int

    def pair(self, number: int) -> tuple[int, int]:
        """Which content and which style picture the lesson of that number is about."""
        return number % len(self.latents[0]), number % len(self.latents[1])

    def prompts(self, number: int) -> list[dict]:
        """Model conditionings of a lesson: content's, style's."""
        return [conds[picture] for conds, picture in zip(self.conds, self.pair(number))]


def _cloned(value):
    """A tensor of a conditioning, wherever it is, as one that autograd may use."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_cloned(item) for item in value]
    return value


def model_conds(model, positive, latent: torch.Tensor, device, seed: int) -> dict:
    """The host's model conditionings of one prompt, for one row."""
    converted = comfy.sampler_helpers.convert_cond(positive)
    found = comfy.samplers.process_conds(model.model, latent, {"positive": converted}, device, latent, None, seed)
    conds = found["positive"][0]["model_conds"]
    made = {name: cond.process_cond(batch_size=1, area=None) for name, cond in conds.items()}
    for cond in made.values():
        cond.cond = _cloned(cond.cond)
    return made


class Trainer:
    """The model under training: `predict` for a batch of rows, `loss` of a step."""

    def __init__(self, model, lora: MaskedLoRA, lessons: Lessons, vector: MaskVector):
        self.model, self.lora, self.lessons, self.vector = model, lora, lessons, vector
        self.device = model.load_device
        self.sampling = model.model.model_sampling
        dtype = model.model.get_dtype_inference()
        self.autocast = None if dtype == torch.float32 else dtype
        self.teachers: list[tuple] = []
        layouts = layouts_of(model.model.diffusion_model)
        # A class that turns its rows round, or may do so, gets the rows of one LoRA at a time.
        self._apart = layouts.swaps or not layouts.known

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, rows: list[int], conds: list[dict], masks=None):
        """x0 of each row, in one call of the model where the prompts can be put side by side.

        Args:
            x: (rows, C, …). sigma: (rows,).
            rows, masks: as `MaskedLoRA.use` takes them.
            conds: the model conditionings of each row.
        """
        if not self._apart:
            try:
                return self._predict(x, sigma, rows, conds, masks)
            except UnknownRows as unknown:
                self._apart = True
                logging.warning("StyleLoom: a layer got %s; the LoRAs run one after the other, in more time", unknown)
        return self._predict(x, sigma, rows, conds, masks)

    def _predict(self, x, sigma, rows, conds, masks) -> torch.Tensor:
        made, start = [], 0
        while start < len(rows):
            end = start + 1
            while end < len(rows) and self._together(rows, conds, start, end):
                end += 1
            self.lora.use(rows[start:end], masks)
            c = comfy.samplers.cond_cat(conds[start:end])
            c["transformer_options"] = {
                "cond_or_uncond": [0] * (end - start),
                "sigmas": sigma[start:end],
                **self.lora.options,
            }
            with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
                made.append(self.model.model.apply_model(x[start:end], sigma[start:end], **c).float())
            start = end
        return made[0] if len(made) == 1 else torch.cat(made)

    def _together(self, rows, conds, one: int, other: int) -> bool:
        """Two rows can share a call: prompts of unlike lengths cannot be put side by side in every model."""
        if self._apart and rows[one] != rows[other]:
            return False
        return comfy.samplers.cond_equal_size(conds[one], conds[other])

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.sampling.noise_scaling(sigma, noise, x0, False)

    def prepare(self, on_step: Callable) -> None:
        """The teachers: each LoRA alone, on its own noised pictures, under their own prompts."""
        generator = torch.Generator().manual_seed(self.lessons.seed & (2**63 - 1))
        content, style = self.lessons.latents
        for number in range(self.lessons.count):
            one, two = self.lessons.pair(number)
            pair = torch.stack((content[one], style[two])).to(self.device)
            share = (number + float(torch.rand((), generator=generator))) / self.lessons.count  # spread evenly
            sigma = torch.full((2,), float(self.sampling.percent_to_sigma(share)), device=self.device)
            noise = torch.randn(pair[0].shape, generator=generator).to(self.device).expand_as(pair)
            x = self.noised(pair, noise, sigma)
            with torch.no_grad():
                target = self.predict(x, sigma, [CONTENT, STYLE], self.lessons.prompts(number))
            self.teachers.append((x, sigma, noise, target))
            on_step()
        self.lora.check_called()

    def loss(self, number: int, cycle: float, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Reconstruction, plus the cycle: mean squared errors of the predicted noise."""
        number %= len(self.teachers)
        x, sigma, noise, target = self.teachers[number]
        prompts, scale = self.lessons.prompts(number), 1 / float(sigma[0]) ** 2
        if cycle == 0:
            found = self.predict(x, sigma, [MERGED, MERGED], prompts, masks)
            return scale * (found - target).square().mean()
        both = self.lessons.both[self.lessons.pair(number)]
        found = self.predict(
            torch.cat((x, x)), torch.cat((sigma, sigma)), [MERGED] * 4, [*prompts, both, both], masks
        )
        recon = scale * (found[:2] - target).square().mean()
        again = self.noised(found[2:], noise, sigma)
        back = self.predict(again, sigma, [CONTENT, STYLE], prompts)
        return recon + cycle * scale * (back - target).square().mean()


@dataclass
class Trained:
    """vector: the best masks. stopped: the step of an interrupt, or None."""

    vector: torch.Tensor
    losses: list[float]
    best_step: int
    stopped: int | None = None


def train(
    trainer: Trainer,
    steps: int,
    rate: float,
    cycle: float,
    prior: tuple[torch.Tensor, torch.Tensor],
    prior_weight: float,
    on_step: Callable[[list[float]], None],
) -> Trained:
    """Adam on the masks, kept in [0, 1.5] after each step. An interrupt of the host ends it with the best masks so far.

    Args:
        prior: (p_c, p_s), each (layers, 1).
    """
    vector = trainer.vector
    z = torch.nn.Parameter(vector.start.to(trainer.device, copy=True))
    optimizer = torch.optim.Adam([z], lr=rate)
    best = Best(z.detach(), min(len(trainer.teachers), steps))
    for number in range(steps):
        try:
            on_step(best.losses)
            with AddOutOfPlace():
                loss = trainer.loss(number, cycle, vector.layers(z))
                if prior_weight:
                    loss = loss + prior_weight * prior_loss(vector.shares(z), *prior)
            optimizer.zero_grad()
            loss.backward()
        except comfy.model_management.InterruptProcessingException:
            logging.warning("StyleLoom: training was interrupted at step %d; the best masks so far are kept", number)
            return Trained(best.vector.cpu(), best.losses, best.step, number)
        if not bool(loss.isfinite()):
            logging.warning("StyleLoom: the loss is not finite at step %d; the best masks before it are kept", number)
            return Trained(best.vector.cpu(), best.losses, best.step, number)
        best.add(float(loss.detach()), z)
        torch.nn.utils.clip_grad_norm_([z], 1.0)
        optimizer.step()
        with torch.no_grad():
            z.clamp_(0, MAX_MASK)
    return Trained(best.vector.cpu(), best.losses, best.step)
