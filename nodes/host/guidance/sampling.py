"""A guider with two LoRA states, and the host's KSampler (Advanced) around it."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview

from ....weights.errors import StyleLoomError
from ....weights.row_adapters.rows import NEGATIVE, POSITIVE
from ..missing_keys import ERROR
from .entries import Entries
from .guider import AsymmetricCFGGuider
from .own_loras import lifted
from .plan import make_plan
from .presets import AS_WIRED, arranged

# What an empty latent says of its size, for models of another compression.
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def make_guider(
    model, positive, negative, cfg, positive_entries: Entries, negative_entries: Entries, preset=AS_WIRED, missing=ERROR
):
    """GUIDER, with its `report`. `negative` may be None with cfg 1 only."""
    sides = arranged(preset, positive_entries, negative_entries, cfg)
    if negative is None and (cfg != 1 or sides.negative):
        raise StyleLoomError(
            f"negative is not connected, and cfg is {cfg:g}" + (" with a negative LoRA" if sides.negative else ""),
            "a negative prompt, or cfg 1 without a negative LoRA",
            "Connect a CLIP Text Encode with an empty text to negative, or set cfg to 1.",
        )
    own: Entries = ()
    if sides.lift:
        model, own = lifted(model)
        if not own and not sides.positive:
            raise StyleLoomError(
                f"preset is {preset}, and there is no LoRA: none on the model and none in positive_lora",
                "a LoRA for the positive side",
                "Connect one to positive_lora, or put one on the model with Load LoRA.",
            )
    plan = make_plan(model, {POSITIVE: [*own, *sides.positive], NEGATIVE: list(sides.negative)}, missing)
    plan.report[:0] = sides.lines
    guider = AsymmetricCFGGuider(model, plan)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    logging.info("StyleLoom: Asymmetric CFG:\n%s", guider.report)
    return guider


def sigmas_of(model, steps, sampler_name, scheduler, denoise, start, end, leftover):
    """The sigmas of the host's KSampler (Advanced).

    Returns:
        (those of all steps, those of the steps that run, the number of the first that runs, counted from 0). Each ends
        with the sigma at which the last step ends.
    """
    every = comfy.samplers.KSampler(
        model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options
    ).sigmas
    sigmas = every
    if end < len(sigmas) - 1:
        sigmas = sigmas[: end + 1].clone()
        if not leftover:
            sigmas[-1] = 0
    return every, sigmas[start:], start


def sample(guider, noise, latent, sampler_name, sigmas, every, seed):
    """The host's KSampler with another guider; returns the samples.

    noise, latent: (batch, channels, …). sigmas, every: From `sigmas_of`.
    """
    model = guider.model_patcher
    ratios = {name: latent[name] for name in RATIOS if name in latent}  # older hosts know, and write, only the first
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
    if len(sigmas) < 2:
        return samples
    guider.all_sigmas = every
    made = guider.sample(
        noise(samples),
        samples,
        comfy.samplers.sampler_object(sampler_name),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    # The dtype of results came with a later host than the oldest that the pack runs on.
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: made.dtype)()
    return made.to(comfy.model_management.intermediate_device(), dtype)
