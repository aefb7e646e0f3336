"""Published ways of giving LoRAs to the two sides of guidance.

Each is a choice of sides and windows. Nothing that an artist set is widened or replaced: strengths multiply, windows
become narrower only, and a LoRA that has no side here is named in the report.
"""

from __future__ import annotations

import dataclasses

from ....weights.errors import StyleLoomError
from .entries import Entries
from .schedule import StepWindow

AS_WIRED, I2L, POSITIVE_ONLY, BASE, CRAFT = "as wired", "i2L", "positive only", "base unconditional", "CRAFT"
PRESETS = [AS_WIRED, I2L, POSITIVE_ONLY, BASE, CRAFT]

# Where each is from, and what was set there besides.
_SOURCES = {
    I2L: "arXiv 2606.13809, published with cfg 4 and 50 steps",
    POSITIVE_ONLY: "as the Z-Image-i2L predictors of version 1 were published, with cfg 4 or 7",
    BASE: "arXiv 2503.20240, and the guidance of arXiv 2511.03156",
    CRAFT: "arXiv 2602.18936, published with 50 steps and a guidance of 7.5, which is cfg 8.5 here",
}
# CRAFT: the content LoRA and the style LoRA, in steps of 50.
_CONTENT, _STYLE = StepWindow(1, 35, 50), StepWindow(15, 50, 50)


@dataclasses.dataclass(frozen=True)
class Arranged:
    """The LoRAs of both sides, and the lines that say what a preset did.

    lift: Whether LoRAs that the model is patched with go to the positive side alone.
    """

    positive: Entries
    negative: Entries
    lines: tuple[str, ...] = ()
    lift: bool = False


def arranged(preset: str, positive: Entries, negative: Entries, cfg: float) -> Arranged:
    """Both sides as the preset has them.

    Raises:
        StyleLoomError: what is connected is not what the preset is for.
    """
    if preset not in PRESETS:
        raise StyleLoomError(f"preset is {preset!r}", f"one of {', '.join(PRESETS)}", "Choose one of the list.")
    if preset == AS_WIRED:
        return Arranged(positive, negative)
    lines = [f"preset {preset} ({_SOURCES[preset]}); cfg here is {cfg:g}"]
    if cfg == 1:
        lines.append("  with cfg 1 only the positive side runs: the preset has nothing to act against")
    if preset in (I2L, POSITIVE_ONLY) and not positive:
        raise _lacks(preset, "positive_lora", "the LoRA of the references in positive_lora")
    if preset == I2L:
        if not any(entry.strength for entry in negative):
            raise _lacks(preset, "negative_lora", "the LoRA of gray pictures in negative_lora", bool(negative))
        lines.append("  the LoRA of the references on the positive side, that of gray pictures on the negative side")
        return Arranged(positive, negative, tuple(lines))
    if negative:
        lines.append(f"  negative_lora is connected and not used ({len(negative)} LoRAs): choose as wired to use it")
    if preset == CRAFT:
        positive = _craft(positive)
        lines.append(f"  LoRA 1, the content: steps {_CONTENT.first} to {_CONTENT.last} of {_CONTENT.of}, or the same "
                     "share of your steps")
        lines.append(f"  LoRA 2, the style: steps {_STYLE.first} to {_STYLE.last} of {_STYLE.of}")
    lines.append("  the negative side runs without a LoRA" + (
        ", and without those that the model is patched with" if preset == BASE else ""))
    return Arranged(positive, (), tuple(lines), preset == BASE)


def _craft(positive: Entries) -> Entries:
    if len(positive) != 2:
        raise StyleLoomError(
            f"preset {CRAFT} is for two LoRAs on the positive side, and positive_lora has {len(positive)}",
            "the content LoRA first, the style LoRA second",
            "Put two LoRA Stack nodes in a row, the content LoRA into the first and the style LoRA into the second, "
            "and connect the second to positive_lora.",
        )
    return tuple(
        dataclasses.replace(entry, steps=window) for entry, window in zip(positive, (_CONTENT, _STYLE), strict=True)
    )


def _lacks(preset: str, name: str, expected: str, connected: bool = False) -> StyleLoomError:
    return StyleLoomError(
        f"preset is {preset}, and {name} " + ("has strength 0" if connected else "is not connected"),
        expected,
        f"Give it a strength, or choose preset {POSITIVE_ONLY}." if connected else "Connect it, or choose as wired.",
    )
