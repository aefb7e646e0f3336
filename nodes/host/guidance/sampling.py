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
from .entries import Entries
from .guider import AsymmetricCFGGuider
from .plan import make_plan

# What an empty latent says of its size, for models of another compression.
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def make_guider(model, positive, negative, cfg, positive_entries: Entries, negative_entries: Entries):
    """(GUIDER, report). `negative` may be None with cfg 1 only."""
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
    report = "\n".join(plan.report)
    logging.info("StyleLoom: Asymmetric CFG:\n%s", report)
    return guider, report


def sample(guider, noise, latent, steps, sampler_name, scheduler, denoise, start, end, leftover, seed):
    """The host's KSampler (Advanced) with another guider; returns the samples.

    noise, latent: (batch, channels, …). Sigmas are those of the host's KSampler.
    """
    model = guider.model_patcher
    ratios = {name: latent[name] for name in RATIOS if name in latent}  # older hosts know, and write, only the first
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
