"""Which host this is, for errors that have to do with it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def host_versions() -> str:
    """ "ComfyUI 0.30.0, comfy-kitchen 0.2.26, comfy-aimdo 0.4.11": what a report of such an error needs."""
    try:
        from comfyui_version import __version__ as own
    except ImportError:  # embedded: the host's files without its start
        own = "of unknown version"
    found = [f"ComfyUI {own}"]
    for name in ("comfy-kitchen", "comfy-aimdo"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
