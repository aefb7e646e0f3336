"""What a LoRA file says of itself: the words that call for it, and the model that it was trained on.

The metadata of a file is text from anywhere: whatever cannot be read counts as absent, and nothing in it is long enough
to be a burden. Written by: sd-scripts (`ss_tag_frequency`, `ss_base_model_version`, `ss_sd_model_name`), the SAI model
specification (`modelspec.trigger_phrase`, `modelspec.architecture`), ai-toolkit (a `ss_tag_frequency` of the trigger
word alone), and tools that copy Civitai's page into the file (`trainedWords`, `baseModel`, also as JSON under
`civitai`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Longest JSON that is read (a frequency table of 100 000 tags is some 3 million characters), longest word, most words.
_LONGEST_JSON, _LONGEST_WORD, _MOST_WORDS = 8_000_000, 120, 10

_PHRASES = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trigger_word", "ss_trigger_words",
            "activation text", "ss_activation_text", "trainedWords", "trained_words", "instance_prompt")  # fmt: skip
_BASES = ("modelspec.architecture", "ss_base_model_version", "baseModel", "base_model")
_CHECKPOINTS = ("ss_sd_model_name", "base_model_name_or_path")
_NESTED = ("civitai", "civitai_info", "civitai.info", "model_info", "lora_adapter_metadata")
_NOTHING = {"", "none", "null", "unknown", "n/a", "[]", "{}"}


@dataclass(frozen=True)
class LoRAFacts:
    """What the metadata says.

    Attributes:
        trigger_words: In the order of the file, or the most frequent first.
        guessed: The trigger words are the most frequent tags of the captions, as nothing names them.
        base_model: The architecture as the file spells it, '' where it does not say.
        checkpoint: The file that it was trained on, '' where it does not say.
    """

    trigger_words: tuple[str, ...] = ()
    guessed: bool = False
    base_model: str = ""
    checkpoint: str = ""


def facts_of(metadata: Any) -> LoRAFacts:
    """What the metadata of a LoRA file says of its trigger words and its base model.

    Args:
        metadata: Strings by name, as safetensors has them; anything else counts as no metadata.
    """
    if not isinstance(metadata, Mapping):
        return LoRAFacts()
    given = {key: value for key, value in metadata.items() if isinstance(key, str)}
    sources = [given, *(found for name in _NESTED if isinstance(found := _json(given.get(name)), Mapping))]
    words: list[str] = []
    for source in sources:
        for name in _PHRASES:
            words += _words(source.get(name))
    named = _first(words)
    found = named or _frequent(_json(given.get("ss_tag_frequency")))
    return LoRAFacts(found, bool(found) and not named, _text_of(sources, _BASES), _text_of(sources, _CHECKPOINTS))


def _json(value: Any) -> Any:
    """What a text says as JSON; a value that is no text as it is; None where it cannot be read."""
    if not isinstance(value, str):
        return value
    if len(value) > _LONGEST_JSON:
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _clean(text: str) -> str:
    """On one line, without what cannot be printed, not too long; '' for words that mean nothing."""
    printable = "".join(c if c.isprintable() else " " for c in text[: 4 * _LONGEST_WORD])
    made = " ".join(printable.split())[:_LONGEST_WORD].strip(" ,")
    return made if made.lower() not in _NOTHING and any(c.isalnum() for c in made) else ""


def _words(value: Any) -> list[str]:
    """Words of a list, or of a text that is a JSON list or has commas between them."""
    if isinstance(value, str):
        read = _json(value) if value.lstrip().startswith("[") else None
        value = read if isinstance(read, list) else value[:_LONGEST_JSON].split(",")
    if not isinstance(value, list):
        return []
    texts = [item for item in value[: 10 * _MOST_WORDS] if isinstance(item, str)]
    return [made for text in texts for part in text.split(",") if (made := _clean(part))]


def _first(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))[:_MOST_WORDS]


def _frequent(table: Any) -> tuple[str, ...]:
    """The tags of captions that are at least half as frequent as the most frequent one: folder -> tag -> count. A tag
    that occurs once among many is part of one caption, and no trigger word."""
    counts: dict[str, int] = {}
    for folder in table.values() if isinstance(table, Mapping) else ():
        for tag, count in folder.items() if isinstance(folder, Mapping) else ():
            if isinstance(tag, str) and type(count) is int and 0 < count < 2**53 and (word := _clean(tag)):
                counts[word] = counts.get(word, 0) + count
    most = max(counts.values(), default=0)
    if most == 1 and len(counts) > 1:
        return ()
    often = [word for word, count in counts.items() if 2 * count >= most]
    return tuple(sorted(often, key=lambda word: (-counts[word], word))[:_MOST_WORDS])


def _text_of(sources: Iterable[Mapping], names: Iterable[str]) -> str:
    for source in sources:
        for name in names:
            value = source.get(name)
            if isinstance(value, str) and (made := _clean(value)):
                return made.removesuffix("/lora")
    return ""
