"""Learning the masks of a merge through the diffusion model.

One batched pass of the model makes every term of a step: the merged LoRA on a content and on a style picture, held
against what each LoRA alone makes of them. Those teachers do not depend on the masks, so they are computed once for a
few noised pictures and kept. With the Constyle cycle, two more rows in the same pass add the other concept (with the
merged network), and a second pass takes it away again with the LoRA of the picture's own concept: two passes with
gradient.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.conds
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from ....weights.merge.objective import MAX_MASK, Best, MaskVector, prior_loss
from .masked_lora import CONTENT, MERGED, STYLE, MaskedLoRA


@dataclass
class Lessons:
    """What is trained on. conds: model conditionings (one row) of the content prompt, the style prompt and both
    together. latents: of content and style, in the model's own latent space. count: noised pictures of each."""

    conds: list[dict]
    latents: tuple[torch.Tensor, torch.Tensor]
    count: int
    seed: int


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
    """The model under training: `predict` for a batch of rows, `step` for a loss with its gradient."""

    def __init__(self, model, lora: MaskedLoRA, lessons: Lessons, vector: MaskVector):
        self.model, self.lora, self.lessons, self.vector = model, lora, lessons, vector
        self.device = model.load_device
        self.sampling = model.model.model_sampling
        dtype = model.model.get_dtype_inference()
        self.autocast = None if dtype == torch.float32 else dtype
        self.teachers: list[tuple] = []

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, rows: list[int], conds: list[int]) -> torch.Tensor:
        """x0 of each row. x (rows, C, H, W), sigma (rows,); which LoRA and which prompt each row has."""
        self.lora.rows = rows
        c = comfy.samplers.cond_cat([self.lessons.conds[i] for i in conds])
        c["transformer_options"] = {"cond_or_uncond": list(conds), "sigmas": sigma}
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model.model.apply_model(x, sigma, **c).float()

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.sampling.noise_scaling(sigma, noise, x0, False)

    def prepare(self, on_step: Callable) -> None:
        """The teachers: each LoRA alone, on its own noised pictures."""
        generator = torch.Generator().manual_seed(self.lessons.seed & (2**63 - 1))
        content, style = self.lessons.latents
        for number in range(self.lessons.count):
            pair = torch.stack((content[number % len(content)], style[number % len(style)])).to(self.device)
            share = (number + float(torch.rand((), generator=generator))) / self.lessons.count  # spread evenly
            sigma = torch.full((2,), float(self.sampling.percent_to_sigma(share)), device=self.device)
            noise = torch.randn(pair[0].shape, generator=generator).to(self.device).expand_as(pair)
            x = self.noised(pair, noise, sigma)
            with torch.no_grad():
                target = self.predict(x, sigma, [CONTENT, STYLE], [0, 1])
            self.teachers.append((x, sigma, noise, target))
            on_step()

    def loss(self, number: int, cycle: float) -> torch.Tensor:
        """Reconstruction, plus the cycle: mean squared errors of the predicted noise."""
        x, sigma, noise, target = self.teachers[number % len(self.teachers)]
        scale = 1 / float(sigma[0]) ** 2
        if cycle == 0:
            return scale * (self.predict(x, sigma, [MERGED, MERGED], [0, 1]) - target).square().mean()
        found = self.predict(torch.cat((x, x)), torch.cat((sigma, sigma)), [MERGED] * 4, [0, 1, 2, 2])
        recon = scale * (found[:2] - target).square().mean()
        again = self.noised(found[2:], noise, sigma)
        back = self.predict(again, sigma, [CONTENT, STYLE], [0, 1])
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
            trainer.lora.masks = vector.layers(z)
            loss = trainer.loss(number, cycle)
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


class Checkpointing:
    """The host's own gradient checkpointing around the blocks of a model, while the block is entered."""

    def __init__(self, model, enabled: bool):
        self.modules, self.unpatch = [], None
        if not enabled:
            return
        try:
            from comfy_extras.nodes_train import find_modules_at_depth, patch, unpatch
        except ImportError:
            logging.info("StyleLoom: this ComfyUI has no checkpointing to use: training takes more memory")
            return
        self._patch, self.unpatch = patch, unpatch
        self.modules = find_modules_at_depth(model.model.diffusion_model, depth=1)

    def __enter__(self) -> Checkpointing:
        for module in self.modules:
            self._patch(module)
        return self

    def __exit__(self, *exc) -> None:
        for module in self.modules:
            self.unpatch(module)
