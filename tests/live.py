"""The real ComfyUI that tests/server and tests/browser talk to. tests/conftest.py loads this by path."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The host's default forgets results by how much memory the machine has left, in the middle of a test on a busy one.
# This many nodes it remembers whatever else runs: what one test has made, the next takes from there.
REMEMBERS = ["--cache-lru", "150"]


def runner(name: str) -> ModuleType:
    """One module of tests/runner, in the package `styleloom_runner`, imported by path."""
    if "styleloom_runner" not in sys.modules:
        folder = ROOT / "tests" / "runner"
        spec = importlib.util.spec_from_file_location("styleloom_runner", folder / "__init__.py",
                                                      submodule_search_locations=[str(folder)])
        sys.modules["styleloom_runner"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["styleloom_runner"])
    return importlib.import_module(f"styleloom_runner.{name}")


@contextlib.contextmanager
def running(folder: Path) -> Iterator:
    """A running Server with the pack and the kit, its base directory in `folder`: `.url`, `.base`, `.log_text()`.

    Fails the test, never skips it, when the server cannot be had.
    """
    host = os.environ.get("STYLELOOM_HOST")
    if not host:
        pytest.fail("STYLELOOM_HOST is not set: it must name the ComfyUI folder to test in. `python run.py test` "
                    "sets it.", pytrace=False)
    if not (Path(host) / "comfy" / "cli_args.py").is_file():
        pytest.fail(f"STYLELOOM_HOST={host} is not a ComfyUI folder: comfy/cli_args.py is missing.", pytrace=False)
    module = runner("server")
    server = module.Server(Path(host), module.make_base(folder, ROOT), sys.executable, extra_args=REMEMBERS)
    try:
        server.__enter__()
    except module.StepFailed as error:
        pytest.fail(f"The host did not start: {error}", pytrace=False)
    try:
        failed = server.failed_imports()
        if failed:
            pytest.fail(f"The host could not load {failed}. Its log:\n{server.log_text()}", pytrace=False)
        yield server
    finally:
        server.stop()
