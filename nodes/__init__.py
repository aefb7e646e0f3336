"""The host-facing half: schemas, validation, wiring. Everything about tensors is in `weights/`."""

from __future__ import annotations

import logging

OLDEST_HOST = "0.30.0"


async def entrypoint():
    """The pack as the host's extension object.

    Raises:
        ImportError: the host is too old; one line says which version is needed.
    """
    try:
        from .extension import StyleLoomExtension
    except (ImportError, AttributeError, TypeError) as error:
        found = _host_version()
        raise ImportError(f"StyleLoom needs ComfyUI {OLDEST_HOST} or newer, this is {found}: please update ComfyUI "
                          f"({error})") from error
    logging.debug("StyleLoom on ComfyUI %s", _host_version())
    return StyleLoomExtension()


def _host_version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return "of an unknown version"
    return __version__
