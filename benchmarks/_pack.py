"""Makes the pack importable as `styleloom`, by path, as tests/conftest.py does and for the same reason."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def import_pack() -> None:
    """After this, `from styleloom.weights… import …` works. The pack's root never goes on `sys.path`."""
    if "styleloom" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "styleloom", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["styleloom"] = module
    spec.loader.exec_module(module)


def machine() -> dict:
    """Processor, cores that this process may use, and memory, for the record next to a figure."""
    info = {"system": platform.system(), "python": platform.python_version()}
    if sys.platform == "linux":
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        info["cpu"] = names[0].split(":", 1)[1].strip() if names else platform.machine()
        info["cores"] = len(os.sched_getaffinity(0))
        info["ram_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    else:
        info.update(cpu=platform.processor(), cores=os.cpu_count())
    return info
