"""The two modes of ZipRank Merge that run the model: what they are given, and what they hand back.

`work` is the merge (`ziprank_run.ZipRank`) after its `prepare`.
"""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from PIL import Image, ImageDraw, ImageFont

from ....weights.errors import StyleLoomError
from ....weights.merge.objective import MaskVector
from ....weights.merge.two_loras import prior_columns
from ....weights.row_adapters.masked import CONTENT, STYLE
from ..progress import Steps
from .gradients import Checkpointing, training_clone, without_copies
from .heat_map import loss_curve
from .lora_passes import calibrate, empty_latent, encode, following, generate, prompts, with_text_part
from .masked_lora import MaskedLoRA, stacked_ranks
from .settings import MergeSettings
from .train_masks import Lessons, Trainer, model_conds, train

LESSONS = 16  # noised pictures of each concept whose teachers are kept, at least
PICTURES = 4  # that a LoRA makes of its own concept where none are given, at least

NAMES = ("content", "style")


def _given(model, settings: MergeSettings) -> tuple[list[list[str]], list[torch.Tensor | None]]:
    """Prompts and latents of both concepts; latents as the model takes them."""
    texts = [prompts(text, f"{name}_prompt") for text, name in zip(settings.prompts, NAMES)]
    latents = []
    for given, name in zip(settings.latents, NAMES):
        found = None if given is None else given["samples"]
        if found is not None and (found.ndim < 4 or not len(found) or not bool(found.isfinite().all())):
            raise StyleLoomError(
                f"{name}_latents is {list(found.shape)}, or holds NaN or infinity",
                "latents of at least one picture",
                "Connect VAE Encode with pictures of one size.",
            )
        latents.append(None if found is None else comfy.sample.fix_empty_latent_channels(model, found))
    return texts, latents


def measure(work) -> list:
    """Calibration: H_c and H_s of each shared layer. The model is as before afterwards."""
    settings = MergeSettings.of(work.settings)
    texts, latents = _given(work.model, settings)
    levels = settings.calibration_steps
    steps = Steps(levels * sum(map(len, texts)))
    layers = len(work.prepared.targets)
    return calibrate(
        work.model.clone(), work.clip, work.tensors, work.strengths, stacked_ranks(work.prepared), layers, texts,
        latents, settings.size, levels, settings.seed, steps,
    )  # fmt: skip


def learn(work, start):
    """Training: (Trained, masks)."""
    settings = MergeSettings.of(work.settings)
    texts, latents = _given(work.model, settings)
    pictures = _pictures(work, settings, texts, latents)
    with torch.inference_mode(False):
        model = training_clone(work.model)
        # The clone may share its weights with the model that was given: what they are set to is put back.
        flags = [(p, p.requires_grad) for p in model.model.parameters()]
        host, model_training = comfy.model_management, model.model.training
        before = getattr(host, "in_training", None)
        try:
            _set_flags([(parameter, False) for parameter, _ in flags])
            on_gpu = not host.is_device_cpu(model.load_device)
            with MaskedLoRA(model, stacked_ranks(work.prepared)) as lora, Checkpointing(model, lora, on_gpu):
                lessons = _lessons(work, model, settings, texts, pictures)
                host.load_models_gpu(
                    [model, *model.get_nested_additional_models()], memory_required=1e20, force_full_load=True
                )
                vector = MaskVector(work.prepared, start)
                if before is not None:
                    host.in_training = True
                with torch.enable_grad():
                    trainer = Trainer(model, lora, lessons, vector)
                    curve = Curve(lessons.count + settings.steps)
                    trainer.prepare(curve)
                    prior = prior_columns(work.prepared, work.prior)
                    trained = train(
                        trainer, settings.steps, settings.learning_rate, settings.cycle_weight, prior,
                        settings.prior_weight, curve,
                    )  # fmt: skip
        finally:
            if before is not None:
                host.in_training = before
            _set_flags(flags)
            without_copies(model)
            model.model.train(model_training)
        return trained, vector.masks(trained.vector, start)


def _set_flags(flags: list) -> None:
    """requires_grad of each parameter; those made in inference mode may be changed in it only."""
    for parameter, needed in flags:
        with torch.inference_mode(parameter.is_inference()):
            parameter.requires_grad_(needed)


def _pictures(work, settings: MergeSettings, texts, latents) -> list[torch.Tensor]:
    """Latents of both concepts: the given ones, else what each LoRA makes of its prompts, one after the other."""
    counts = [max(PICTURES, len(lines)) if found is None else 0 for lines, found in zip(texts, latents)]
    steps, made = Steps(max(1, sum(counts) * settings.calibration_steps)), []
    model = work.model.clone()
    with MaskedLoRA(model, stacked_ranks(work.prepared)) as lora:
        for role in (CONTENT, STYLE):
            if latents[role] is not None:
                made.append(latents[role])
                continue
            lora.use([role])
            encoder = with_text_part(work.clip, work.tensors[role], work.strengths[role])
            positives = [encode(encoder, text) for text in texts[role]]
            empty, found = empty_latent(model, settings.size), []
            for number in range(counts[role]):
                positive, seed = positives[number % len(positives)], following(settings.seed, number)
                found.append(generate(model, positive, empty, settings.calibration_steps, seed, steps))
                lora.check_called()
            made.append(torch.cat(found))
    if made[0].shape[1:] != made[1].shape[1:]:
        raise StyleLoomError(
            f"content_latents and style_latents are {list(made[0].shape[1:])} and {list(made[1].shape[1:])}",
            "one size for both, as they go through the model together",
            "Scale or crop the pictures to one size before VAE Encode, or set size to theirs.",
        )
    return made


def _lessons(work, model, settings: MergeSettings, texts, pictures) -> Lessons:
    """Each picture with its own prompt: the lines of a prompt take turns."""
    latents = tuple(model.model.process_latent_in(latent.clone().float()) for latent in pictures)
    device = model.load_device
    sample = latents[0][:1].to(device)
    encoders = [with_text_part(work.clip, *lora) for lora in zip(work.tensors, work.strengths)] + [work.clip]
    made: dict[tuple[int, str], dict] = {}

    def conds(encoder: int, text: str) -> dict:
        if (encoder, text) not in made:
            with torch.no_grad():
                made[encoder, text] = model_conds(
                    model, encode(encoders[encoder], text), sample, device, settings.seed
                )
        return made[encoder, text]

    own = [[lines[number % len(lines)] for number in range(len(each))] for lines, each in zip(texts, latents)]
    lessons = Lessons(
        latents,
        tuple([conds(role, text) for text in own[role]] for role in (CONTENT, STYLE)),
        {},
        max(LESSONS, *map(len, latents)),
        settings.seed,
    )
    if settings.cycle_weight:
        pairs = {lessons.pair(number) for number in range(lessons.count)}
        lessons.both |= {(i, j): conds(2, f"{own[CONTENT][i]}, {own[STYLE][j]}") for i, j in sorted(pairs)}
    return lessons


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
