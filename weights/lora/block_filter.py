"""A LoRA restricted to some blocks of a UNet: strengths inside and outside of them, in the file's own keys.

Blocks come from the tables of `ip_adapter/blocks.py`: what carries style or layout for a picture shown to a layer is
what carries it in the layer's own weights (B-LoRA, arXiv 2403.14572, found the same blocks by training). Names of
layers are read in every spelling: diffusers' (`up_blocks.0.attentions.1`) and the original one (`output_blocks.1.1`),
with dots or kohya's underscores.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import StyleLoomError
from ..unet.blocks import ARCHITECTURES, Architecture, Block
from .lora_model import LoRAModel

STYLE, CONTENT, LAYOUT, ATTENTION, CUSTOM = (
    "style blocks",
    "content blocks",
    "layout",
    "attention only",
    "custom patterns",
)
PRESETS = (STYLE, CONTENT, LAYOUT, ATTENTION, CUSTOM)

# What follows the name of a layer in a key, over all kinds that the host reads.
_PART = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?:A|B|down|up|mid)(?:\.default)?(?:\.weight)?|[._]lora\.(?:down|up)\.weight"
    r"|\.lora_linear_layer\.(?:down|up)\.weight|\.(?:alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|rescale)"
    r"|\.hada_(?:w[12]_[ab]|t[12])|\.lokr_(?:w[12](?:_[ab])?|t2)|\.oft_(?:blocks|diag)|\.[ab][12]\.weight"
    r"|\.reshape_weight)$"
)
_UNET = (
    (re.compile(r"(?:^|_)(down|up)_blocks_(\d+)_attentions_(\d+)_"), "{0}_blocks.{1}.attentions.{2}"),
    (re.compile(r"(?:^|_)mid_block_attentions_(\d+)_"), "mid_block.attentions.{0}"),
    (re.compile(r"(?:^|_)(input|output)_blocks_(\d+)_1_"), "{0} {1}"),
    (re.compile(r"(?:^|_)middle_block_1_"), "middle 0"),
)
_ATTENTION = re.compile(r"(?:^|[._])(?:attn\d?|attention|self_attn|cross_attn|attentions?_?\d*_to)(?:[._]|$)")
_TEXT = ("lora_te", "text_encoder", "text_model", "te.", "te1.", "te2.", "clip_l", "clip_g")


@dataclass(frozen=True)
class Filtered:
    """`lora` with the strengths applied; `report` in words."""

    lora: LoRAModel
    report: str


def _layers(lora: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Layer's name as the file spells it → its keys."""
    layers: dict[str, list[str]] = {}
    for key in lora:
        match = _PART.fullmatch(key)
        if match is None:
            raise StyleLoomError(
                f"the LoRA has the key {key!r}, whose layer cannot be told",
                "keys such as ….lora_up.weight, ….hada_w1_a, ….lokr_w1, ….diff",
                "Save the LoRA again with a current trainer, or apply it without Block Filter.",
            )
        layers.setdefault(match["stem"], []).append(key)
    return layers


def _place(stem: str) -> str | None:
    """The block of a layer, under diffusers' name or the original one; None outside the transformers of a UNet."""
    flat = stem.replace(".", "_") + "_"
    for pattern, name in _UNET:
        match = pattern.search(flat)
        if match:
            return name.format(*match.groups())
    return None


def _blocks_of(architecture: Architecture) -> dict[str, Block]:
    """Every name of a block → the block."""
    names = {diffusers: block for block, _, diffusers in architecture.blocks}
    return names | {f"{block[0]} {block[1]}": block for block, _, _ in architecture.blocks}


def _architecture(stems: list[str]) -> Architecture:
    """Of which UNet these layers are: each has blocks with cross-attentions that the others do not have."""
    places = {place for stem in stems if (place := _place(stem))}
    fitting = [a for a in ARCHITECTURES if places and places <= set(_blocks_of(a))]
    if len(fitting) > 1:  # blocks that both have; SDXL's transformers are deeper
        deep = any(re.search(r"transformer_blocks[._][1-9]", stem) for stem in stems)
        fitting = [a for a in fitting if deep == any(depth > 1 for _, depth, _ in a.blocks)]
    if len(fitting) != 1:
        raise StyleLoomError(
            f"the LoRA is for no UNet whose style blocks are known ({stems[0]}, …)",
            "a LoRA for SDXL or SD1.5",
            "Choose preset custom patterns and name the layers yourself.",
        )
    return fitting[0]


def _inside(stems: list[str], preset: str, patterns: str) -> tuple[set[str], str]:
    """(the layers inside, in words what that is)."""
    if preset == ATTENTION:
        return {stem for stem in stems if _ATTENTION.search(stem)}, "attention layers"
    if preset == CUSTOM:
        return _matching(stems, patterns)
    architecture = _architecture(stems)
    chosen = {STYLE: architecture.style, CONTENT: architecture.content, LAYOUT: architecture.layout}[preset]
    if not chosen:
        raise StyleLoomError(
            f"{preset} of {architecture.name} are not known",
            "a LoRA for SDXL",
            "Choose another preset, or custom patterns.",
        )
    names = _blocks_of(architecture)
    words = ", ".join(name for block, _, name in architecture.blocks if block in chosen)
    return {stem for stem in stems if names.get(_place(stem)) in chosen}, f"{preset} of {architecture.name}: {words}"


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


def _rank(lora: Mapping[str, torch.Tensor], keys: list[str]) -> int | None:
    """Rank by which the host divides alpha, for the kinds whose strength is alpha over rank."""
    for key in keys:
        if re.search(r"(lora_(A|down)(\.default)?(\.weight)?|[._]lora\.down\.weight|layer\.down\.weight)$", key):
            return lora[key].shape[0]
        if key.endswith(".hada_w1_b"):
            return lora[key].shape[0]
    return None


def _scaled(lora: Mapping[str, torch.Tensor], stem: str, keys: list[str], strength: float) -> dict[str, torch.Tensor]:
    """The tensors of one layer whose change is `strength` times as large."""
    kept = {key: lora[key] for key in keys}
    if strength == 1.0:
        return kept
    strange = [key for key in keys if re.search(r"\.(dora_scale|set_weight|oft_\w+|rescale|[ab][12]\.weight)$", key)]
    if strange:
        raise StyleLoomError(
            f"{strange[0]} is of a kind (DoRA, OFT, GLoRA, a set weight) whose change does not scale",
            "strengths 0 or 1 for such layers",
            "Set inside and outside to 0 or 1.",
        )
    rank = _rank(lora, keys)
    if rank is not None:
        # The tensors stay as they are: the host multiplies by alpha / rank, in fp32.
        alpha = float(lora[f"{stem}.alpha"]) if f"{stem}.alpha" in lora else float(rank)
        kept[f"{stem}.alpha"] = torch.tensor(alpha * strength, dtype=torch.float32)
    scalable = (".lokr_w1", ".lokr_w1_a", ".diff", ".diff_b", ".w_norm", ".b_norm")
    for key in keys:
        if key.endswith(scalable):
            kept[key] = (lora[key].float() * strength).to(lora[key].dtype)
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
    chosen, words = _inside(list(layers), preset, patterns)
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
    text = sum(stem.startswith(_TEXT) and stem not in chosen for stem in layers)
    report = (
        f"inside: {len(chosen)} of {len(layers)} layers at {inside:g} ({words})\n"
        f"outside: {len(layers) - len(chosen)} layers at {outside:g}"
        + (f", {text} of them of the text encoder" if text else "")
    )
    return Filtered(LoRAModel(made, getattr(lora, "metadata", {})), report)
