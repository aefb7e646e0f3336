"""Which tensor of which adapter a key of a LoRA file is. The endings of keys are those of the table of kinds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import StyleLoomError
from .kinds import IA3, KINDS

_ENDINGS = {part: ending for kind in KINDS for part, ending in kind.endings.items()}
# Every ending begins with `.` or `_`: elsewhere in a key none of the many needs to be tried.
_KEY = re.compile("(?=[._])(?:" + "|".join(f"(?P<{part}>{ending})$" for part, ending in _ENDINGS.items()) + ")")


def key_part(key: str) -> tuple[str, str] | None:
    """(stem, part) of a key of a LoRA file: `….to_q.lora_A.default.weight` → (`….to_q`, `down`); None where the ending
    belongs to no kind of the table."""
    match = _KEY.search(key)
    if match is None or match.start() == 0:
        return None
    return key[: match.start()], match.lastgroup


def group_keys(lora: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys of a LoRA by stem and part, and those that belong to no adapter.

    Raises:
        StyleLoomError: two keys for one part: PEFT files with several adapters.
    """
    stems: dict[str, dict[str, str]] = {}
    unknown = []
    for key in lora:
        found = key_part(key)
        if found is None:
            unknown.append(key)
            continue
        stem, part = found
        if part in stems.setdefault(stem, {}):
            raise StyleLoomError(
                f"{key} and {stems[stem][part]} are the same part of one adapter",
                "one adapter for each layer",
                "The file holds several adapters: save one of them alone.",
            )
        stems[stem][part] = key
    for part, (companion, ending) in IA3.only_beside.items():
        for stem, parts in stems.items():
            if companion in parts and stem + ending in lora:
                parts[part] = stem + ending
                unknown.remove(stem + ending)
    return stems, unknown


def tensors_of(lora: Mapping[str, Any], parts: Mapping[str, str]) -> dict[str, Any]:
    """Part → tensor, of part → key."""
    return {part: lora[key] for part, key in parts.items()}
