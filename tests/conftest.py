"""Makes the pack importable as `styleloom`.

The pack's root must never be put on `sys.path`: it holds a folder `nodes`, and `import nodes` belongs
to the host. So the tests import the pack the way the host does, by path, under a name of their own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# The models of the tests are so small that a second thread costs more than it gives, and on a busy machine a hundred
# times more (OpenMP's threads wait for each other by spinning). Servers started by the tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


def _import_pack() -> None:
    if "styleloom" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "styleloom", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["styleloom"] = module
    spec.loader.exec_module(module)


_import_pack()
