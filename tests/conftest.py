"""Makes the pack importable as `styleloom`, and lends a real ComfyUI to the tests that talk to one.

The pack's root must never be put on `sys.path`: it holds a folder `nodes`, and `import nodes` belongs
to the host. So the tests import the pack the way the host does, by path, under a name of their own.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

# The models of the tests are so small that a second thread costs more than it gives, and on a busy machine a hundred
# times more (OpenMP's threads wait for each other by spinning). Servers started by the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


def _import_by_path(name: str, path: Path, **options):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, **options)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


_import_by_path("styleloom", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])


def pytest_collection_finish():
    """What is imported by now never becomes garbage, and what tests make comes and goes without cycles, in thousands:
    with Python's own thresholds a tenth of all time would go into looking for garbage. The tests of the host, which hold
    the most, collect it after each file."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _live():
    return _import_by_path("styleloom_live", ROOT / "tests" / "live.py")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real ComfyUI with the pack and the kit: `.url`, `.base`, `.log_text()`. One for all tests that talk to one.

    Fails, never skips, when it cannot be had.
    """
    with _live().running(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture
def client(server):
    """A Client of its own for each test, on the one server."""
    with _live().runner("client").Client(server.url) as talk:
        yield talk
