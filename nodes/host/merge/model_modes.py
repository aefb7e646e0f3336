"""The two modes of ZipRank Merge that run the model: what they are given, and what they hand back."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from PIL import Image, ImageDraw, ImageFont

from ....weights.errors import StyleLoomError
from ....weights.merge.two_loras import prior_columns
from ....weights.merge.objective import MaskVector
from .lora_passes import calibrate, empty_latent, encode, generate, prompts, with_text_part
from .masked_lora import CONTENT, STYLE, MaskedLoRA, paths_of
from ..progress import Steps
from .train_masks import Checkpointing, Lessons, Trainer, model_conds, train, training_clone, without_copies
from .heat_map import loss_curve

LESSONS = 16  # noised pictures of each concept whose teachers are kept
PICTURES = 4  # that a LoRA makes of its own concept where none are given


def _given(work) -> tuple[list[list[str]], list[torch.Tensor | None]]:
    """Prompts and latents of both concepts."""
    settings = work.settings
    texts = [prompts(settings.get(f"{side}_prompt", ""), f"{side}_prompt") for side in ("content", "style")]
    latents = []
    for side in ("content", "style"):
        given = settings.get(f"{side}_latents")
        found = None if given is None else given["samples"]
        if found is not None and (found.ndim < 4 or not len(found) or not bool(found.isfinite().all())):
            raise StyleLoomError(
                f"{side}_latents is {list(found.shape)}, or holds NaN or infinity",
                "latents of at least one picture",
                "Connect VAE Encode with pictures of one size.",
            )
        latents.append(found)
    return texts, latents


def measure(work) -> list:
    """Calibration: H_c and H_s of each shared layer. The model is as before afterwards."""
    texts, latents = _given(work)
    settings = work.settings
    levels = settings["calibration_steps"]
    steps = Steps(levels * sum(map(len, texts)))
    layers = len(work.prepared.targets)
    return calibrate(
        work.model.clone(), work.clip, work.tensors, work.strengths, paths_of(work.prepared), layers, texts, latents,
        settings["size"], levels, settings["seed"], steps,
    )  # fmt: skip


def learn(work, start):
    """Training: (Trained, masks)."""
    texts, latents = _given(work)
    settings, clip = work.settings, work.clip
    paths = paths_of(work.prepared)
    made = _pictures(work, texts, latents, paths)
    with torch.inference_mode(False):
        both = ", ".join((texts[CONTENT][0], texts[STYLE][0]))
        with torch.no_grad():
            encoders = [with_text_part(clip, lora, s) for lora, s in zip(work.tensors, work.strengths)]
            positives = [encode(encoders[side], texts[side][0]) for side in (CONTENT, STYLE)] + [encode(clip, both)]
        model = training_clone(work.model)
        device = model.load_device
        # The clone may share its weights with the model that was given: what they are set to is put back.
        flags = [(p, p.requires_grad) for p in model.model.parameters()]
        training, model_training = comfy.model_management, model.model.training
        before = getattr(training, "in_training", None)
        try:
            _set_flags([(parameter, False) for parameter, _ in flags])
            comfy.model_management.load_models_gpu([model], memory_required=1e20, force_full_load=True)
            lessons = _lessons(model, positives, made, device, settings["seed"])
            vector = MaskVector(work.prepared, start)
            on_gpu = not comfy.model_management.is_device_cpu(device)
            local = [_own(path) for path in paths]
            if before is not None:
                training.in_training = True
            with torch.enable_grad(), MaskedLoRA(model.model, local) as lora, Checkpointing(model, on_gpu):
                trainer = Trainer(model, lora, lessons, vector)
                curve = Curve(LESSONS + settings["steps"])
                trainer.prepare(curve)
                prior = prior_columns(work.prepared, work.prior)
                trained = train(
                    trainer, settings["steps"], settings["learning_rate"], settings["cycle_weight"], prior,
                    settings["prior_weight"], curve,
                )  # fmt: skip
        finally:
            if before is not None:
                training.in_training = before
            _set_flags(flags)
            without_copies(model)
            model.model.train(model_training)
        return trained, vector.masks(trained.vector, start)


def _set_flags(flags: list) -> None:
    """requires_grad of each parameter; those made in inference mode may be changed in it only."""
    for parameter, needed in flags:
        with torch.inference_mode(parameter.is_inference()):
            parameter.requires_grad_(needed)


def _own(path):
    """LowRank that autograd may save: those made in inference mode may not be."""
    path.down, path.up = path.down.clone(), path.up.clone()
    return path


def _pictures(work, texts, latents, paths) -> list[torch.Tensor]:
    """Latents of both concepts: the given ones, else what each LoRA makes of its prompts."""
    settings, made = work.settings, []
    missing = sum(found is None for found in latents)
    steps = Steps(max(1, missing * PICTURES * settings["calibration_steps"]))
    with MaskedLoRA(work.model.model, paths) as lora:
        for side in (CONTENT, STYLE):
            if latents[side] is not None:
                made.append(latents[side])
                continue
            lora.rows = [side]
            encoder = with_text_part(work.clip, work.tensors[side], work.strengths[side])
            empty = empty_latent(work.model, settings["size"])
            found = []
            for number in range(PICTURES):
                positive = encode(encoder, texts[side][number % len(texts[side])])
                found.append(
                    generate(work.model.clone(), positive, empty, settings["calibration_steps"],
                             settings["seed"] + number, steps)
                )  # fmt: skip
            made.append(torch.cat(found))
    if made[0].shape[1:] != made[1].shape[1:]:
        raise StyleLoomError(
            f"content_latents and style_latents are {list(made[0].shape[1:])} and {list(made[1].shape[1:])}",
            "one size for both, as they go through the model together",
            "Scale or crop the pictures to one size before VAE Encode, or set size to theirs.",
        )
    return made


def _lessons(model, positives, made, device, seed: int) -> Lessons:
    latents = tuple(model.model.process_latent_in(latent.clone().float()) for latent in made)
    with torch.no_grad():
        conds = [model_conds(model, positive, latents[0][:1].to(device), device, seed) for positive in positives]
    return Lessons(conds, latents, LESSONS, seed)


class Curve:
    """Progress of a training run: the bar, the loss curve as its preview, and Cancel."""

    def __init__(self, total: int):
        self._bar, self._total, self._done = comfy.utils.ProgressBar(total), total, 0
        self._font = ImageFont.load_default(size=12)

    def __call__(self, losses: list[float] = ()) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += 1
        preview = None
        if len(losses) > 1 and (len(losses) % 5 == 0 or self._done == self._total):
            picture = Image.new("RGB", (480, 240), (250, 250, 248))
            loss_curve(ImageDraw.Draw(picture), self._font, list(losses), (8, 8, 472, 232))
            preview = ("JPEG", picture, 480)
        self._bar.update_absolute(self._done, self._total, preview)
