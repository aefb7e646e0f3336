"""JSON from a file of unknown origin, read strictly.

`json.loads` takes more than the standard allows and lets several kinds of exception out. Here one kind comes out,
ValueError, and its text says in plain words what is wrong.
"""

from __future__ import annotations

import json

_LARGEST = 2**64 - 1


def parse(text: str | bytes) -> object:
    """Parse JSON whose numbers are all whole and below 2^64 in size.

    Args:
        text: bytes must be UTF-8.

    Returns:
        dict, list, str, int, bool or None.

    Raises:
        ValueError: not UTF-8, not JSON, other numbers, a name twice in one object, half of a surrogate pair in a text
            (such a text cannot be written to any file), or nesting that exhausts Python's stack.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_int=_whole_number,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
        if "\\u" in text:  # only an escape can make half of a surrogate pair
            _check_text(value)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def kind(value: object) -> str:
    """What a parsed value is, in words for an error: "a list", "a text", …"""
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a text", int: "a number", bool: "true or false"}[type(value)]


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        again = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it has {shorten(again)} twice")
    return found


def _whole_number(digits: str) -> int:
    # The length is asked first: Python refuses, or takes long, to convert thousands of digits.
    if digits == "-0" or len(digits) > len(str(_LARGEST)) or int(digits) > _LARGEST:
        _no_number(digits)
    return int(digits)


def _no_number(written: str) -> None:
    shown = written if len(written) <= 30 else written[:30] + "…"
    raise ValueError(f"the number {shown} is not a whole number below 2^64")


def _check_text(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text in it has half of a surrogate pair") from None


def shorten(text: str) -> str:
    """A text in quotes, cut where it would make an error too long to read."""
    return repr(text if len(text) <= 120 else text[:120] + "…")
