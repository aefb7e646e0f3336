"""LoRA Stack, Asymmetric CFG Guider, Asymmetric CFG Sampler."""

from __future__ import annotations

import dataclasses
import logging

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io, ui

from ..weights.row_adapters.rows import NEGATIVE, POSITIVE
from ..weights.errors import StyleLoomError
from .host.guidance.guider import AsymmetricCFGGuider
from .host.guidance.plan import make_plan
from .host.guidance.schedule import BranchLoRA
from .types import CATEGORY_GUIDANCE, CATEGORY_LORA, LoRA, LoRAStack

Entries = tuple[BranchLoRA, ...]

# What an empty latent says of its size, for models of another compression.
_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def entries_of(lora, strength: float, start_percent: float, end_percent: float, name: str) -> Entries:
    """A LORA_MODEL or a stack, as the LoRAs of one branch: strengths multiply, windows intersect.

    Raises:
        StyleLoomError: the window is empty, or the input is neither.
    """
    if lora is None:
        return ()
    if start_percent >= end_percent:
        raise StyleLoomError(
            f"{name}: start_percent {start_percent:g} is not before end_percent {end_percent:g}",
            "a part of sampling, for example 0 to 0.6",
            "Swap the two, or set the strength to 0 to leave the LoRA out.",
        )
    if isinstance(lora, dict):
        lora = (BranchLoRA(lora),)
    if not isinstance(lora, tuple) or not all(isinstance(entry, BranchLoRA) for entry in lora):
        raise StyleLoomError(
            f"{name} is a {type(lora).__name__}",
            "a LoRA",
            "Connect Image-to-LoRA Predictor, Load LoRA File, ComfyUI's LoRA Model output or LoRA Stack.",
        )
    return tuple(
        dataclasses.replace(
            entry,
            strength=entry.strength * strength,
            start_percent=max(entry.start_percent, start_percent),
            end_percent=min(entry.end_percent, end_percent),
        )
        for entry in lora
    )


def make_guider(model, positive, negative, cfg, positive_entries: Entries, negative_entries: Entries):
    """GUIDER, with its `report`. `negative` may be None with cfg 1 only."""
    if negative is None and (cfg != 1 or negative_entries):
        raise StyleLoomError(
            f"negative is not connected, and cfg is {cfg:g}" + (" with a negative LoRA" if negative_entries else ""),
            "a negative prompt, or cfg 1 without a negative LoRA",
            "Connect a CLIP Text Encode with an empty text to negative, or set cfg to 1.",
        )
    plan = make_plan(model, {POSITIVE: list(positive_entries), NEGATIVE: list(negative_entries)})
    guider = AsymmetricCFGGuider(model, plan)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    logging.info("StyleLoom: Asymmetric CFG:\n%s", guider.report)
    return guider


def sample(guider, noise, latent, steps, sampler_name, scheduler, denoise, start, end, leftover, seed):
    """The host's KSampler (Advanced) with another guider; returns the samples.

    noise, latent: (batch, channels, …). Sigmas are those of the host's KSampler.
    """
    model = guider.model_patcher
    ratios = {name: latent[name] for name in _RATIOS if name in latent}  # older hosts know, and write, only the first
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
    sigmas = comfy.samplers.KSampler(
        model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options
    ).sigmas
    if end < len(sigmas) - 1:
        sigmas = sigmas[: end + 1].clone()
        if not leftover:
            sigmas[-1] = 0
    if start >= len(sigmas) - 1:
        return samples
    made = guider.sample(
        noise(samples),
        samples,
        comfy.samplers.sampler_object(sampler_name),
        sigmas[start:],
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1 - start),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    # The dtype of results came with a later host than the oldest that the pack runs on.
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: made.dtype)()
    return made.to(comfy.model_management.intermediate_device(), dtype)


def _percent(name: str, default: float, tooltip: str):
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, optional=True, advanced=True, tooltip=tooltip
    )


def _strength(name: str, tooltip: str):
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.05, optional=True, tooltip=tooltip)


def _guidance_inputs() -> tuple[list, list, list]:
    """Sockets, cfg, and what belongs to the LoRAs: the same for both nodes."""
    sockets = [
        io.Model.Input(
            "model", tooltip="The diffusion model. LoRAs that it already has act on both sides. It stays as it is."
        ),
        io.Conditioning.Input("positive", tooltip="What the picture shall show."),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="What it shall not show; an empty text is common. May be left out only with cfg 1.",
        ),
        io.MultiType.Input(
            "positive_lora",
            [LoRA, LoRAStack],
            optional=True,
            tooltip="The LoRA of the positive side, for example the style: from Image-to-LoRA Predictor, Load LoRA "
            "File or LoRA Stack.",
        ),
        io.MultiType.Input(
            "negative_lora",
            [LoRA, LoRAStack],
            optional=True,
            tooltip="The LoRA of the negative side, for example the one predicted from Gray References. Left out: the "
            "negative side runs without a LoRA.",
        ),
    ]
    cfg = io.Float.Input(
        "cfg",
        default=4.0,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="How far the result is pushed from the negative side towards the positive side. It also pushes towards "
        "the positive LoRA. i2L was published with 4. With 1 only the positive side runs.",
    )
    loras = [
        _strength("positive_strength", "Scales the positive LoRA; 0 leaves it out and costs nothing."),
        _strength("negative_strength", "Scales the negative LoRA; 0 leaves it out and costs nothing."),
        _percent("positive_start_percent", 0.0, "The positive LoRA begins to act at this part of sampling."),
        _percent("positive_end_percent", 1.0, "The positive LoRA stops acting at this part of sampling."),
        _percent("negative_start_percent", 0.0, "The negative LoRA begins to act at this part of sampling."),
        _percent("negative_end_percent", 1.0, "The negative LoRA stops acting at this part of sampling."),
    ]
    return sockets, cfg, loras


def _both_entries(
    positive_lora=None,
    negative_lora=None,
    positive_strength=1.0,
    negative_strength=1.0,
    positive_start_percent=0.0,
    positive_end_percent=1.0,
    negative_start_percent=0.0,
    negative_end_percent=1.0,
) -> tuple[Entries, Entries]:
    return (
        entries_of(positive_lora, positive_strength, positive_start_percent, positive_end_percent, "positive_lora"),
        entries_of(negative_lora, negative_strength, negative_start_percent, negative_end_percent, "negative_lora"),
    )


_LATER = "whether both sides run in one batch shows when sampling begins: where they do not, the log says why"

_REPORT = io.String.Output(
    display_name="report", tooltip="What was made of the LoRAs: how many patches, of which kinds, in which way."
)


class LoRAStackNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoRAStack",
            display_name="LoRA Stack",
            category=CATEGORY_LORA,
            description="Several LoRAs for one side of guidance, each with its own strength and its own part of "
            "sampling. Chain one node per LoRA.",
            search_aliases=["multiple loras", "chain lora", "lora schedule"],
            inputs=[
                LoRA.Input("lora", tooltip="The LoRA that this node adds."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Scales the change that it makes.",
                ),
                LoRAStack.Input("stack", optional=True, tooltip="The LoRAs before this one."),
                _percent("start_percent", 0.0, "It begins to act at this part of sampling."),
                _percent("end_percent", 1.0, "It stops acting at this part of sampling."),
                io.HookKeyframes.Input(
                    "keyframes",
                    optional=True,
                    advanced=True,
                    tooltip="Strength from step to step, from ComfyUI's Create Hook Keyframe nodes; it multiplies.",
                ),
            ],
            outputs=[
                LoRAStack.Output(
                    display_name="stack",
                    tooltip="For positive_lora or negative_lora of Asymmetric CFG Sampler and Guider, or the next LoRA "
                    "Stack.",
                )
            ],
        )

    @classmethod
    def execute(cls, lora, strength, stack=(), start_percent=0.0, end_percent=1.0, keyframes=None) -> io.NodeOutput:
        made = entries_of(lora, strength, start_percent, end_percent, "lora")
        return io.NodeOutput((*stack, *(dataclasses.replace(entry, keyframes=keyframes) for entry in made)))


class AsymmetricCFGGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sockets, cfg, loras = _guidance_inputs()
        return io.Schema(
            node_id="StyleLoomAsymmetricCFGGuider",
            display_name="Asymmetric CFG Guider",
            category=CATEGORY_GUIDANCE,
            description="Guidance with one LoRA on the positive side and another, or none, on the negative side, both "
            "computed in one pass. For SamplerCustomAdvanced.",
            search_aliases=["cfg guider", "lora guidance", "i2l", "negative lora"],
            inputs=[*sockets, cfg, *loras],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced."), _REPORT],
        )

    @classmethod
    def execute(cls, model, positive, cfg, negative=None, **loras) -> io.NodeOutput:
        guider = make_guider(model, positive, negative, cfg, *_both_entries(**loras))
        report = f"{guider.report}\n{_LATER}"
        return io.NodeOutput(guider, report, ui=ui.PreviewText(report))


class AsymmetricCFGSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sockets, cfg, loras = _guidance_inputs()
        return io.Schema(
            node_id="StyleLoomAsymmetricCFGSampler",
            display_name="Asymmetric CFG Sampler",
            category=CATEGORY_GUIDANCE,
            description="A KSampler with one LoRA on the positive side of guidance and another, or none, on the "
            "negative side, both computed in one pass: as Image-to-LoRA was published.",
            search_aliases=["ksampler", "cfg", "lora guidance", "i2l", "negative lora", "gray lora"],
            inputs=[
                *sockets[:3],
                io.Latent.Input("latent_image", tooltip="The latent to start from."),
                *sockets[3:],
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Decides the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Number of steps."),
                cfg,
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="The way of going from noise to image.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How noise is taken away, step by step.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1, part of latent_image stays: for image to image.",
                ),
                *loras,
                io.Combo.Input(
                    "add_noise",
                    options=["enable", "disable"],
                    default="enable",
                    optional=True,
                    advanced=True,
                    tooltip="disable: latent_image already has its noise, from a sampler before.",
                ),
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    advanced=True,
                    tooltip="First step to run.",
                ),
                io.Int.Input(
                    "end_at_step",
                    default=10000,
                    min=0,
                    max=10000,
                    optional=True,
                    advanced=True,
                    tooltip="Step to stop before.",
                ),
                io.Combo.Input(
                    "return_with_leftover_noise",
                    options=["disable", "enable"],
                    default="disable",
                    optional=True,
                    advanced=True,
                    tooltip="enable: when stopping early, keep the noise that is left, for a sampler after this one.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent."), _REPORT],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        negative=None,
        add_noise="enable",
        start_at_step=0,
        end_at_step=10000,
        return_with_leftover_noise="disable",
        **loras,
    ) -> io.NodeOutput:
        guider = make_guider(model, positive, negative, cfg, *_both_entries(**loras))

        def noise(samples: torch.Tensor) -> torch.Tensor:
            if add_noise == "disable":
                return torch.zeros_like(samples, device="cpu")
            return comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))

        samples = sample(
            guider,
            noise,
            latent_image,
            steps,
            sampler_name,
            scheduler,
            denoise,
            start_at_step,
            end_at_step,
            return_with_leftover_noise == "enable",
            seed,
        )
        made = {name: value for name, value in latent_image.items() if name not in _RATIOS}
        return io.NodeOutput(made | {"samples": samples}, guider.report, ui=ui.PreviewText(guider.report))
