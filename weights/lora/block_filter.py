"""A LoRA restricted to some blocks of a model: strengths inside and outside of them, in the file's own keys.

Blocks come from the tables of `unet/architecture.py` and `dit/blocks.py`: what carries style or layout for a picture
shown to a layer is what carries it in the layer's own weights (B-LoRA, arXiv 2403.14572, found the same blocks by
training). Names of layers are read in every spelling: diffusers' (`up_blocks.0.attentions.1`) and the original one
(`output_blocks.1.1`), with dots or kohya's underscores.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..dit.blocks import FLUX1, DiTBlocks
from ..errors import StyleLoomError
from ..unet.architecture import ARCHITECTURES, Architecture, transformer_of
from .keys import group_keys, tensors_of
from .kinds import kinds_of
from .lora_model import LoRAModel
from .made_for import made_for
from .names import is_text_key

STYLE, CONTENT, LAYOUT, ATTENTION, CUSTOM, STYLE_ALONE = (
    "style blocks",
    "content blocks",
    "layout",
    "attention only",
    "custom patterns",
    "style blocks without the border",
)
PRESETS = (STYLE, CONTENT, LAYOUT, ATTENTION, CUSTOM, STYLE_ALONE)

_ATTENTION = re.compile(r"(?:^|[._])(?:attn\d?|attention|self_attn|cross_attn|attentions?_?\d*_to)(?:[._]|$)")


@dataclass(frozen=True)
class Filtered:
    """`lora` with the strengths applied; `report` in words."""

    lora: LoRAModel
    report: str


def _layers(lora: Mapping[str, torch.Tensor]) -> dict[str, dict[str, str]]:
    """Layer's name as the file spells it → part of its adapter → key."""
    layers, unknown = group_keys(lora)
    if unknown:
        raise StyleLoomError(
            f"the LoRA has the key {unknown[0]!r}, whose layer cannot be told",
            "keys such as ….lora_up.weight, ….hada_w1_a, ….lokr_w1, ….diff",
            "Save the LoRA again with a current trainer, or apply it without Block Filter.",
        )
    return layers


def _architecture(stems: list[str]) -> Architecture:
    """Of which UNet these layers are: each has transformers that the others do not have, or have less deep."""
    places = {place for stem in stems if (place := transformer_of(stem))}
    fitting = [a for a in ARCHITECTURES if places and all(a.has(*place) for place in places)]
    if len(fitting) > 1:  # blocks that both have, and no layer that only the deeper one has
        fitting = [a for a in fitting if all(depth == 1 for _, depth, _ in a.blocks)]
    if len(fitting) != 1:
        raise StyleLoomError(
            f"the LoRA is for no UNet whose style blocks are known ({stems[0]}, …)",
            "a LoRA for SDXL, SD1.5 or FLUX.1",
            "Choose preset custom patterns and name the layers yourself.",
        )
    return fitting[0]


def _inside(lora: Mapping, stems: list[str], preset: str, patterns: str) -> tuple[set[str], str]:
    """(the layers inside, in words what that is)."""
    if preset == ATTENTION:
        return {stem for stem in stems if _ATTENTION.search(stem)}, "attention layers"
    if preset == CUSTOM:
        return _matching(stems, patterns)
    if made_for(lora) == FLUX1.name:
        return _inside_dit(FLUX1, stems, preset)
    architecture = _architecture(stems)
    roles = {STYLE: architecture.style, CONTENT: architecture.content, LAYOUT: architecture.layout}
    chosen = roles.get(preset)
    if not chosen:
        raise _not_known(preset, architecture.name, "SDXL" if preset in roles else FLUX1.name)
    words = ", ".join(name for block, _, name in architecture.blocks if block in chosen)
    inside = {stem for stem in stems if (place := transformer_of(stem)) and place[0] in chosen}
    return inside, f"{preset} of {architecture.name}: {words}"


def _inside_dit(model: DiTBlocks, stems: list[str], preset: str) -> tuple[set[str], str]:
    alone = range(model.border[-1] + 1, model.style[-1] + 1)
    chosen = {STYLE: model.style, CONTENT: model.content, STYLE_ALONE: alone}.get(preset)
    if chosen is None:
        raise _not_known(preset, model.name, "SDXL or SD1.5")
    words = f"{preset} of {model.name}: {model.words(chosen)} ({model.source})"
    if preset == STYLE:
        words += f"; content leaks into {model.border[0]} and {model.border[-1]}: {STYLE_ALONE} leaves them out"
    return {stem for stem in stems if model.block_of(stem) in chosen}, words


def _not_known(preset: str, model: str, known: str) -> StyleLoomError:
    return StyleLoomError(
        f"{preset} of {model} are not known", f"a LoRA for {known}", "Choose another preset, or custom patterns."
    )


def _matching(stems: list[str], patterns: str) -> tuple[set[str], str]:
    wanted = [line.strip() for line in re.split(r"[,\n]", patterns) if line.strip()]
    if not wanted:
        raise StyleLoomError(
            "preset is custom patterns and patterns is empty",
            "parts of layer names, one a line; * stands for anything",
            "Write for example: up_blocks.0.attentions.1",
        )
    found: set[str] = set()
    for pattern in wanted:
        flat = "*" + pattern.replace(".", "_").strip("*") + "*"
        hits = {stem for stem in stems if fnmatch.fnmatchcase(stem.replace(".", "_") + "_", flat)}
        if not hits:
            raise StyleLoomError(
                f"the pattern {pattern!r} matches none of the LoRA's {len(stems)} layers",
                f"a part of a name such as {stems[0]}",
                "Correct the pattern, or leave it out.",
            )
        found |= hits
    return found, "patterns " + ", ".join(wanted)


def _scaled(
    lora: Mapping[str, torch.Tensor], stem: str, keys: Mapping[str, str], strength: float
) -> dict[str, torch.Tensor]:
    """The tensors of one layer whose change is `strength` times as large."""
    parts = tensors_of(lora, keys)
    kept = {key: lora[key] for key in keys.values()}
    if strength == 1.0:
        return kept
    for kind, own in kinds_of(parts, stem):
        if kind.not_scaled:
            key = next(keys[part] for part in kind.endings if part in own)
            raise StyleLoomError(
                f"{key} is a part of a kind of adapter ({kind.name}) whose change does not scale: {kind.not_scaled}",
                "strengths 0 or 1 for such layers",
                "Set inside and outside to 0 or 1.",
            )
        kept |= {keys.get(part, f"{stem}.{part}"): value for part, value in kind.scaled(own, strength).items()}
    return kept


def filter_blocks(
    lora: Mapping[str, torch.Tensor], preset: str, inside: float = 1.0, outside: float = 0.0, patterns: str = ""
) -> Filtered:
    """Multiply what a LoRA changes inside some blocks by one strength, and elsewhere by another.

    Args:
        lora: tensors in LoRA-file keys. preset: one of `PRESETS`. patterns: for custom patterns, see `_matching`.
        inside, outside: 0 leaves the layers out (all kinds), 1 leaves them as they are (all kinds).

    Returns:
        A new LORA_MODEL; tensors that do not change are shared with the one given.

    Raises:
        StyleLoomError: another base model than the preset is for, no layer inside, nothing left, a layer whose kind
            cannot be scaled, a pattern that matches nothing.
    """
    if preset not in PRESETS:
        raise StyleLoomError(f"preset is {preset!r}", f"one of {', '.join(PRESETS)}", "Choose one of the list.")
    layers = _layers(lora)
    if not layers:
        raise StyleLoomError("the LoRA is empty", "at least one layer", "Look at the node that makes it.")
    chosen, words = _inside(lora, list(layers), preset, patterns)
    if not chosen:
        raise StyleLoomError(
            f"none of the LoRA's {len(layers)} layers is inside ({words})",
            "a LoRA with layers there",
            "Choose another preset: this LoRA does not touch these blocks.",
        )
    made: dict[str, torch.Tensor] = {}
    for stem, keys in layers.items():
        strength = inside if stem in chosen else outside
        if strength:
            made |= _scaled(lora, stem, keys, strength)
    if not made:
        raise StyleLoomError(
            f"inside is {inside:g} and outside {outside:g}: nothing of the LoRA is left",
            "one of them other than 0",
            "Set inside to 1.",
        )
    text = sum(is_text_key(stem) and stem not in chosen for stem in layers)
    report = (
        f"inside: {len(chosen)} of {len(layers)} layers at {inside:g} ({words})\n"
        f"outside: {len(layers) - len(chosen)} layers at {outside:g}"
        + (f", {text} of them of the text encoder" if text else "")
    )
    return Filtered(LoRAModel(made, getattr(lora, "metadata", {})), report)
