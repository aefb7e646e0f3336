"""Running the model with one of two LoRAs: prompts, empty latents, pictures that a LoRA makes, and calibration."""

from __future__ import annotations

from collections.abc import Callable

import comfy.lora
import comfy.lora_convert
import comfy.sample
import comfy.samplers
import torch

from ....weights.errors import StyleLoomError
from ....weights.row_adapters.masked import CONTENT, STYLE
from .masked_lora import MaskedLoRA

SEEDS = 2**64


def following(seed: int, number: int) -> int:
    """The seed of the picture of that number; after the largest comes 0."""
    return (seed + number) % SEEDS


def prompts(text: str, name: str) -> list[str]:
    """One a line. Raises StyleLoomError where there is none."""
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise StyleLoomError(
            f"{name} is empty",
            "a prompt for that LoRA, with its trigger word",
            "Write what you would write to make a picture with this LoRA alone.",
        )
    return found


def with_text_part(clip, lora, strength: float):
    """The CLIP with the LoRA's own part for the text encoder; the same one where it has none."""
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), names, log_missing=False)
    if not patches or strength == 0:
        return clip
    patched = clip.clone()
    patched.add_patches(patches, strength)
    return patched


def encode(clip, text: str):
    """CONDITIONING of a prompt."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def empty_latent(model, size: int) -> torch.Tensor:
    """Zeros for one picture of size × size pixels."""
    format = model.get_model_object("latent_format")
    side = max(1, size // getattr(format, "spacial_downscale_ratio", 8))
    return torch.zeros(1, format.latent_channels, *[1] * (getattr(format, "latent_dimensions", 2) - 2), side, side)


def generate(model, positive, latent: torch.Tensor, steps: int, seed: int, on_step: Callable[[], None]) -> torch.Tensor:
    """A picture's latents, by Euler at guidance 1."""
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", positive, positive, latent, seed=seed, disable_pbar=True,
        callback=lambda *_: on_step(),
    )  # fmt: skip


def run_at_noise_levels(
    model, positive, latents: torch.Tensor, levels: int, seed: int, on_step: Callable[[], None]
) -> None:
    """One pass of the model over noised latents at each of several noise levels, evenly spread over the schedule."""
    sampling = model.get_model_object("model_sampling")
    sampler = comfy.samplers.sampler_object("euler")
    noise = comfy.sample.prepare_noise(latents, seed)
    for level in range(levels):
        sigma = float(sampling.percent_to_sigma((level + 0.5) / levels))
        comfy.sample.sample_custom(
            model, noise, 1.0, sampler, torch.tensor([sigma, 0.0]), positive, positive, latents, seed=seed,
            disable_pbar=True,
        )  # fmt: skip
        on_step()


class Grams:
    """Sums h hᵀ of each shared layer, float64 on the CPU: R × R numbers a layer, whatever the run's length."""

    def __init__(self, layers: int):
        self.found: list[torch.Tensor | None] = [None] * layers

    def __call__(self, index: int, h: torch.Tensor) -> None:
        h = h.detach().float()
        gram = (h.T @ h).cpu().double()
        self.found[index] = gram if self.found[index] is None else self.found[index] + gram


def calibrate(
    model, clip, tensors, strengths, ranks, layers: int, texts, latents, size: int, levels: int, seed: int, on_step
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """H_c and H_s of each shared layer: the content LoRA alone on its prompts, then the style LoRA alone on its own.

    Args:
        model: MODEL, a clone.
        tensors, strengths: of content and style: the LoRAs as given, and their strengths.
        ranks: from `stacked_ranks`. layers: number of shared layers.
        texts: (content prompts, style prompts). latents: (tensor or None, tensor or None), of real pictures.
        levels: noise levels; steps of the run where there are no pictures.

    Raises:
        StyleLoomError: layers of the LoRAs that the model does not call.
    """
    seen = []
    with MaskedLoRA(model, ranks) as lora:
        for role in (CONTENT, STYLE):
            grams = Grams(layers)
            lora.use([role])
            lora.watch(grams)
            encoder = with_text_part(clip, tensors[role], strengths[role])
            for number, text in enumerate(texts[role]):
                positive, own = encode(encoder, text), following(seed, number)
                if latents[role] is None:
                    generate(model, positive, empty_latent(model, size), levels, own, on_step)
                else:
                    run_at_noise_levels(model, positive, latents[role], levels, own, on_step)
                lora.check_called()
            seen.append(grams.found)
    return list(zip(*seen))
