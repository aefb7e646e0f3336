"""Brings up the real ComfyUI in this process, without its server, and loads the pack the way ComfyUI does."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from _pack import ROOT


def start(device: str) -> dict[str, type]:
    """ComfyUI's node classes by id, the pack's among them.

    STYLELOOM_HOST names the ComfyUI folder; without it, the one that `python run.py` put under .host is taken.
    """
    folder = Path(os.environ.get("STYLELOOM_HOST") or ROOT / ".host" / "ComfyUI").resolve()
    if not (folder / "comfy" / "cli_args.py").is_file():
        sys.exit(f"{folder} is not a ComfyUI folder. Set STYLELOOM_HOST to one.")
    base = Path(tempfile.mkdtemp(prefix="styleloom_benchmark_"))
    for name in ("models", "input", "output", "user", "temp", "custom_nodes"):
        (base / name).mkdir()
    # It reads its options while it is imported, so they are set first. Its own folder stands where a script's would.
    sys.path.insert(0, str(folder))
    argv, sys.argv = sys.argv, ["main.py", "--base-directory", str(base), "--disable-all-custom-nodes"]
    if device == "cpu":
        sys.argv.append("--cpu")
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  reads sys.argv
    finally:
        sys.argv = argv
    import nodes

    link = base / "custom_nodes" / "StyleLoom"
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows without the right to make links
        link = ROOT

    async def load() -> bool:
        await nodes.init_public_apis()
        return await nodes.load_custom_node(str(link), module_parent="custom_nodes")

    if not asyncio.run(load()):
        sys.exit("ComfyUI could not load the pack; its log above says why.")
    return nodes.NODE_CLASS_MAPPINGS
