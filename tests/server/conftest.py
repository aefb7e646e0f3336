"""One real ComfyUI server for the whole tier, with the pack and the kit in a base directory of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run_module():
    """run.py, imported by path: the pack's root must not be on sys.path."""
    if "styleloom_run" not in sys.modules:
        spec = importlib.util.spec_from_file_location("styleloom_run", ROOT / "run.py")
        sys.modules["styleloom_run"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["styleloom_run"])
    return sys.modules["styleloom_run"]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running run.Server: `.url`, `.base`, `.log_text()`. Fails, never skips, when it cannot be had."""
    folder = os.environ.get("STYLELOOM_HOST")
    if not folder:
        pytest.fail("STYLELOOM_HOST is not set: it must name the ComfyUI folder to test in. `python run.py test` "
                    "sets it.", pytrace=False)
    run = _run_module()
    base = run.make_base(tmp_path_factory.mktemp("comfyui"), ROOT)
    try:
        running = run.Server(Path(folder), base, sys.executable)
        running.__enter__()
    except run.StepFailed as error:
        pytest.fail(f"The host did not start: {error}", pytrace=False)
    try:
        failed = running.failed_imports()
        if failed:
            pytest.fail(f"The host could not load {failed}. Its log:\n{running.log_text()}", pytrace=False)
        yield running
    finally:
        running.stop()


@pytest.fixture
def client(server):
    """A run.Client of its own for each test, on the one server."""
    with _run_module().Client(server.url) as talk:
        yield talk
