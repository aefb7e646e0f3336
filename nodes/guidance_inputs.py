"""Inputs that LoRA Stack and the two Asymmetric CFG nodes share."""

from __future__ import annotations

from comfy_api.latest import io

from .host.guidance.entries import Entries, entries_of
from .host.guidance.presets import AS_WIRED, PRESETS
from .shared_inputs import missing_keys_input
from .types import LoRA, LoRAStack


def percent_input(name: str, default: float, tooltip: str):
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, optional=True, advanced=True, tooltip=tooltip
    )


def strength_input(name: str, tooltip: str):
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.05, optional=True, tooltip=tooltip)


def guidance_inputs() -> tuple[list, list, list]:
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
        strength_input("positive_strength", "Scales the positive LoRA; 0 leaves it out and costs nothing."),
        strength_input("negative_strength", "Scales the negative LoRA; 0 leaves it out and costs nothing."),
        percent_input("positive_start_percent", 0.0, "The positive LoRA begins to act at this part of sampling."),
        percent_input("positive_end_percent", 1.0, "The positive LoRA stops acting at this part of sampling."),
        percent_input("negative_start_percent", 0.0, "The negative LoRA begins to act at this part of sampling."),
        percent_input("negative_end_percent", 1.0, "The negative LoRA stops acting at this part of sampling."),
    ]
    return sockets, cfg, loras


def mask_inputs() -> list:
    """The masks of both sides; to be appended last, so that the inputs of saved workflows keep their places."""
    return [
        io.Mask.Input(
            f"{side}_mask",
            optional=True,
            advanced=True,
            tooltip=f"The {side} LoRAs act where this mask is white, in the same pass; it multiplies with the masks of "
            "LoRA Stack.",
        )
        for side in ("positive", "negative")
    ]


def both_entries(
    positive_lora=None,
    negative_lora=None,
    positive_strength=1.0,
    negative_strength=1.0,
    positive_start_percent=0.0,
    positive_end_percent=1.0,
    negative_start_percent=0.0,
    negative_end_percent=1.0,
    positive_mask=None,
    negative_mask=None,
) -> tuple[Entries, Entries]:
    positive = entries_of(
        positive_lora,
        positive_strength,
        positive_start_percent,
        positive_end_percent,
        "positive_lora",
        positive_mask,
        "positive_mask",
    )
    negative = entries_of(
        negative_lora,
        negative_strength,
        negative_start_percent,
        negative_end_percent,
        "negative_lora",
        negative_mask,
        "negative_mask",
    )
    return positive, negative


def last_inputs() -> list:
    """What came later, and so stands behind all other inputs: saved workflows list widgets by their order."""
    return [
        io.Combo.Input(
            "preset",
            options=PRESETS,
            default=AS_WIRED,
            optional=True,
            tooltip="A published way of giving LoRAs to the two sides. as wired: what is connected, as it is. i2L: "
            "references on the positive side, gray on the negative side. positive only: nothing on the negative side. "
            "base unconditional: LoRAs that the model already has go to the positive side, too. CRAFT: a stack of two, "
            "content first and style second, each for its part of the steps. The report says what was done.",
        ),
        missing_keys_input(),
    ]


REPORT = io.String.Output(
    display_name="report", tooltip="What was made of the LoRAs: how many patches, of which kinds, in which way."
)
