"""run.py and the modules of the runner, imported by path (the pack's root must not be on sys.path), for their tests."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_run() -> ModuleType:
    """The module run.py; with it the package `styleloom_runner` can be imported."""
    if "styleloom_run" not in sys.modules:
        spec = importlib.util.spec_from_file_location("styleloom_run", ROOT / "run.py")
        sys.modules["styleloom_run"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["styleloom_run"])
    return sys.modules["styleloom_run"]


run = load_run()


def load_runner(name: str) -> ModuleType:
    """One module of tests/runner."""
    return importlib.import_module(f"styleloom_runner.{name}")


def fake_comfyui(parent: Path) -> Path:
    """A folder that looks like a ComfyUI, with a pack in its custom_nodes."""
    folder = parent / "ComfyUI"
    (folder / "custom_nodes" / "StyleLoom").mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text('__version__ = "9.8.7"\n')
    return folder
