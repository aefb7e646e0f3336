"""One real ComfyUI server for the whole tier, with the pack and the kit in a base directory of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def _live():
    if "styleloom_live" not in sys.modules:
        path = Path(__file__).resolve().parents[1] / "live.py"
        spec = importlib.util.spec_from_file_location("styleloom_live", path)
        sys.modules["styleloom_live"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["styleloom_live"])
    return sys.modules["styleloom_live"]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running run.Server: `.url`, `.base`, `.log_text()`. Fails, never skips, when it cannot be had."""
    with _live().running(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture
def client(server):
    """A run.Client of its own for each test, on the one server."""
    with _live().run_module().Client(server.url) as talk:
        yield talk
