"""Which keys of a LoRA find a place in a model, and what becomes of those that find none."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ...weights.errors import StyleLoomError
from ...weights.lora.keys import key_part
from ...weights.lora.made_for import made_for
from ...weights.lora.names import find_target, is_text_key

# What an artist chooses in missing_keys.
ERROR, WARN = "error", "warn"
MISSING = [ERROR, WARN]


def some(keys: Iterable[str]) -> str:
    """The first three, and how many more."""
    keys = list(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@dataclass
class PlacedKeys:
    """Keys of a LoRA and the names of a model.

    Attributes:
        found: The LoRA without what is left out.
        stems: Key in `found` -> the name in the key map that it belongs to.
        key_map: Names -> targets: those of the model that were given, and other spellings of them that the LoRA uses.
        unknown: Keys for the diffusion model that find no place.
        text: Keys for a text encoder that find no place.
        alphas: Alphas beside which there is nothing that they could scale.
    """

    found: dict[str, torch.Tensor]
    stems: dict[str, str]
    key_map: dict[str, Hashable]
    unknown: list[str]
    text: list[str]
    alphas: list[str]


def placed_keys(lora: Mapping[str, torch.Tensor], key_map: Mapping[str, Hashable]) -> PlacedKeys:
    """Find each key's place: under the very name that the key map has, or else under another spelling of it."""
    names = dict(key_map)
    parts = {key: key_part(key) for key in lora}
    alone = _alphas_alone(parts)
    known: dict[str, str | None] = {}
    made = PlacedKeys({}, {}, names, [], [], [])
    for key, tensor in lora.items():
        if parts[key] is None:
            stem = _beginning(key, names)
        else:
            name = parts[key][0]
            if name not in known:
                known[name] = _name_in(name, names)
            stem = known[name]
        if key in alone:
            made.alphas.append(key)
        elif stem is not None:
            made.found[key], made.stems[key] = tensor, stem
        else:
            (made.text if is_text_key(key) else made.unknown).append(key)
    return made


def _alphas_alone(parts: Mapping[str, tuple[str, str] | None]) -> set[str]:
    beside: dict[str, set[str]] = {}
    for found in parts.values():
        if found is not None:
            beside.setdefault(found[0], set()).add(found[1])
    return {key for key, found in parts.items() if found is not None and beside[found[0]] == {"alpha"}}


def _name_in(name: str, key_map: dict[str, Hashable]) -> str | None:
    """The name of the key map that a layer of a LoRA has; another spelling is added to the map."""
    if name not in key_map:
        target = find_target(name, key_map)
        if target is None:
            return None
        key_map[name] = target
    return name


def _beginning(key: str, key_map: Mapping[str, Hashable]) -> str | None:
    """A dotted beginning of a key that is a name of the key map."""
    at = key.find(".")
    while at != -1:
        if key[:at] in key_map:
            return key[:at]
        at = key.find(".", at + 1)
    return None


def without_place(placed: PlacedKeys, model: str, has_clip: bool, lora, label: str, missing: str) -> list[str]:
    """What is left out, in lines for a report.

    Args:
        placed: From `placed_keys`.
        model: What the model is called.
        has_clip: Whether the names of a text encoder were among those of the key map.
        lora: All of the LoRA, to tell what it was made for.
        label: What messages call it.
        missing: `ERROR` or `WARN`.

    Raises:
        StyleLoomError: keys that find no place where `missing` is `ERROR`; a LoRA of which nothing is left.
    """
    count = len(placed.unknown) + len(placed.text) + len(placed.alphas) + len(placed.found)
    made = made_for(lora) if placed.unknown or not placed.found else ""
    file = f"; by its keys it is for {made}" if made else ""
    if placed.unknown and (missing == ERROR or not placed.found):
        raise StyleLoomError(
            f"{len(placed.unknown)} of the {label}'s {count} keys find no place in this {model} model: "
            f"{some(placed.unknown)}{file}",
            f"a LoRA for {model}",
            "Use the LoRA with the model that it was made for"
            + (", or set missing_keys to warn to go on without these keys." if placed.found else "."),
        )
    if not placed.found:
        if placed.text:
            raise StyleLoomError(
                f"all of the {label}'s {len(placed.text)} keys are for a text encoder: {some(placed.text)}{file}",
                "a LoRA with a part for this model" if has_clip else f"a LoRA for {model}, or the text encoder in clip",
                "Use the LoRA with the text encoder that it was made for."
                if has_clip
                else "Connect clip: these keys are for the text encoder.",
            )
        raise StyleLoomError(
            f"the {label} has nothing that changes a model: {len(placed.alphas)} alphas and {count} keys in all",
            "a LoRA with the two halves of its patches",
            "The LoRA file is damaged, or empty: export it again.",
        )
    lines = []
    if placed.unknown:
        lines.append(
            f"left out, as missing_keys is warn: {len(placed.unknown)} of the {label}'s {count} keys find no place in "
            f"this {model} model: {some(placed.unknown)}{file}"
        )
    if placed.text:
        lines.append(
            f"left out: {len(placed.text)} keys are for another text encoder than the one in clip: {some(placed.text)}"
            if has_clip
            else f"left out: {len(placed.text)} keys are for a text encoder: connect clip to apply them, too"
        )
    if placed.alphas:
        lines.append(f"left out: {len(placed.alphas)} alphas that scale nothing: {some(placed.alphas)}")
    unread = [key for key in placed.found if key_part(key) is None]
    if unread:
        lines.append(f"left out: {len(unread)} keys of a form that belongs to no kind of LoRA: {some(unread)}")
    return lines
