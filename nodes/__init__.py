"""The host-facing half: schemas, validation, wiring. Everything about tensors is in `weights/`."""

from __future__ import annotations

import logging
import re

OLDEST_HOST = "0.16.3"  # the oldest that runs the demo workflow; tried, not guessed


async def entrypoint():
    """The pack as the host's extension object.

    Raises:
        ImportError: in one line, that the host is too old and which version is needed.
    """
    found = _host_version()
    try:
        from .extension import NODES, StyleLoomExtension

        for node in NODES:  # an older API shows itself here, where there is a word for it, and not in the host's loader
            node.define_schema()
    except (ImportError, AttributeError, TypeError) as error:
        if _number(found) < _number(OLDEST_HOST):
            raise ImportError(
                f"StyleLoom needs ComfyUI {OLDEST_HOST} or newer, and this is {found}: please update ComfyUI ({error})"
            ) from error
        raise
    logging.debug("StyleLoom on ComfyUI %s", found)
    return StyleLoomExtension()


def _host_version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return "0 (of an unknown version)"
    return __version__


def _number(version: str) -> tuple[int, ...]:
    """'0.30.0' → (0, 30, 0), as far as there are digits."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version).group().split(".") if part)
