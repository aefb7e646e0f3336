"""The real ComfyUI that tests/server and tests/browser talk to. Their conftest.py files load this by path."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_module() -> ModuleType:
    """run.py, imported by path: the pack's root must not be on sys.path."""
    if "styleloom_run" not in sys.modules:
        spec = importlib.util.spec_from_file_location("styleloom_run", ROOT / "run.py")
        sys.modules["styleloom_run"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["styleloom_run"])
    return sys.modules["styleloom_run"]


@contextlib.contextmanager
def running(folder: Path) -> Iterator:
    """A running run.Server with the pack and the kit, its base directory in `folder`: `.url`, `.base`, `.log_text()`.

    Fails the test, never skips it, when the server cannot be had.
    """
    host = os.environ.get("STYLELOOM_HOST")
    if not host:
        pytest.fail("STYLELOOM_HOST is not set: it must name the ComfyUI folder to test in. `python run.py test` "
                    "sets it.", pytrace=False)
    if not (Path(host) / "comfy" / "cli_args.py").is_file():
        pytest.fail(f"STYLELOOM_HOST={host} is not a ComfyUI folder: comfy/cli_args.py is missing.", pytrace=False)
    run = run_module()
    server = run.Server(Path(host), run.make_base(folder, ROOT), sys.executable)
    try:
        server.__enter__()
    except run.StepFailed as error:
        pytest.fail(f"The host did not start: {error}", pytrace=False)
    try:
        failed = server.failed_imports()
        if failed:
            pytest.fail(f"The host could not load {failed}. Its log:\n{server.log_text()}", pytrace=False)
        yield server
    finally:
        server.stop()
