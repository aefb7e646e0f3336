"""Asymmetric CFG Guider, Asymmetric CFG Sampler."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io, ui

from .guidance_inputs import REPORT, both_entries, guidance_inputs, last_inputs, mask_inputs
from .host.guidance.presets import AS_WIRED
from .host.guidance.sampling import RATIOS, make_guider, sample, sigmas_of
from .host.guidance.schedule_plot import draw, in_words, lanes_of
from .host.missing_keys import ERROR
from .types import CATEGORY_GUIDANCE

_LATER = "whether both sides run in one batch shows when sampling begins: where they do not, the log says why"


class AsymmetricCFGGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sockets, cfg, loras = guidance_inputs()
        return io.Schema(
            node_id="StyleLoomAsymmetricCFGGuider",
            display_name="Asymmetric CFG Guider",
            category=CATEGORY_GUIDANCE,
            description="Guidance with one LoRA on the positive side and another, or none, on the negative side, both "
            "computed in one pass. For SamplerCustomAdvanced.",
            search_aliases=["cfg guider", "lora guidance", "i2l", "negative lora"],
            inputs=[*sockets, cfg, *loras, *last_inputs(), *mask_inputs()],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced."), REPORT],
        )

    @classmethod
    def execute(
        cls, model, positive, cfg, negative=None, preset=AS_WIRED, missing_keys=ERROR, **loras
    ) -> io.NodeOutput:
        guider = make_guider(model, positive, negative, cfg, *both_entries(**loras), preset, missing_keys)
        report = f"{guider.report}\n{_LATER}"
        return io.NodeOutput(guider, report, ui=ui.PreviewText(report))


class AsymmetricCFGSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sockets, cfg, loras = guidance_inputs()
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
                *last_inputs(),
                *mask_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The denoised latent."),
                REPORT,
                io.Image.Output(
                    display_name="schedule", tooltip="A picture of how strong each LoRA is in each step, side by side."
                ),
            ],
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
        preset=AS_WIRED,
        missing_keys=ERROR,
        **loras,
    ) -> io.NodeOutput:
        guider = make_guider(model, positive, negative, cfg, *both_entries(**loras), preset, missing_keys)

        def noise(samples: torch.Tensor) -> torch.Tensor:
            if add_noise == "disable":
                return torch.zeros_like(samples, device="cpu")
            return comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))

        every, sigmas, first = sigmas_of(
            guider.model_patcher,
            steps,
            sampler_name,
            scheduler,
            denoise,
            start_at_step,
            end_at_step,
            return_with_leftover_noise == "enable",
        )
        samples = sample(guider, noise, latent_image, sampler_name, sigmas, every, seed)
        lanes = lanes_of(guider.plan, guider.model_patcher, sigmas, every)
        report = "\n".join([guider.report, *in_words(lanes, first)])
        made = {name: value for name, value in latent_image.items() if name not in RATIOS}
        picture = draw(lanes, sigmas, first, cfg)
        return io.NodeOutput(made | {"samples": samples}, report, picture, ui=ui.PreviewText(report))
