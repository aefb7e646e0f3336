"""Brings up the real host in this process, once, and loads the pack and the kit the way the host does.

STYLELOOM_HOST names the ComfyUI folder. A missing host is a failure, never a skip: these tests are the proof that
the pack works in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_KIT_STATE, _KIT_LEFT_OUT, _KIT_TO_PASS = pytest.StashKey[str](), pytest.StashKey[int](), pytest.StashKey[set]()
_PASSED: set[str] = set()
# Lets the tests of this folder share their helpers by plain name.
sys.path.append(str(Path(__file__).resolve().parent))

from shared_models import (  # noqa: E402, F401  fixtures of every test of this folder
    adapters,
    bench,
    benches,
    distance,
    encode,
    left_as_they_were,
    loras,
    models,
    shared_models,
    texts,
    vision,
    weights_as_they_were,
)


@dataclass
class Host:
    """The running host: `nodes` maps node ids to classes, `base` is its base directory, `comfy` its package."""

    path: Path
    base: Path
    nodes: dict[str, type]
    comfy: ModuleType
    folder_paths: ModuleType
    kit: ModuleType

    def run(self, node_id: str, /, **inputs: Any) -> tuple:
        return _run_node(self, node_id, inputs)


# --- tests of the kit run when the kit or the host changed

_KIT_TESTS, _KIT_KEY = "test_kit.py", "styleloom/kit"


def _kit_state() -> str:
    """A hash of everything that the tests of the kit look at: the kit, its tests, the host's library, torch."""
    import torch

    host = os.environ.get("STYLELOOM_HOST")
    files = [*(ROOT / "tests" / "kit").rglob("*.py"), Path(__file__).with_name(_KIT_TESTS), Path(__file__)]
    files += [*(Path(host) / "comfy").rglob("*.py")] if host else []
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of the kit when they passed on these very files, unless the command line names them."""
    mine = [item for item in items if item.path.name == _KIT_TESTS and item.path.parent == Path(__file__).parent]
    named = any(_KIT_TESTS in str(arg) for arg in config.args) or config.option.keyword or config.option.markexpr
    if not mine or getattr(config, "cache", None) is None:
        return
    config.stash[_KIT_STATE] = _kit_state()
    if not named and config.cache.get(_KIT_KEY, None) == config.stash[_KIT_STATE]:
        config.stash[_KIT_LEFT_OUT] = len(mine)
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in set(mine)]
    elif not named:
        config.stash[_KIT_TO_PASS] = {item.nodeid for item in mine}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _PASSED.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if config.stash.get(_KIT_TO_PASS, None) and config.stash[_KIT_TO_PASS] <= _PASSED:
        config.cache.set(_KIT_KEY, config.stash[_KIT_STATE])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.stash.get(_KIT_LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{config.stash[_KIT_LEFT_OUT]} tests of the kit were left out: they passed before on this kit, this host and "
            f"this torch. To run them: name tests/host/{_KIT_TESTS}, or add --cache-clear.")


def _host_folder() -> Path:
    value = os.environ.get("STYLELOOM_HOST")
    if not value:
        pytest.fail("STYLELOOM_HOST is not set: it must name the ComfyUI folder to test in. "
                    "`python run.py test` sets it.", pytrace=False)
    folder = Path(value).resolve()
    if not (folder / "comfy" / "cli_args.py").is_file():
        pytest.fail(f"STYLELOOM_HOST={value} is not a ComfyUI folder: comfy/cli_args.py is missing.", pytrace=False)
    return folder


class _Errors(logging.Handler):
    """The host logs a pack's import error as a warning and goes on; here it is kept for the failure message."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _linked(base: Path, name: str, target: Path) -> Path:
    """`target` under the name that it has in a base directory; itself where links are not allowed (Windows)."""
    link = base / "custom_nodes" / name
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        return target
    return link


def _load(nodes: ModuleType, path: Path, module_parent: str = "custom_nodes") -> ModuleType | None:
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    try:
        loaded = asyncio.run(nodes.load_custom_node(str(path), module_parent=module_parent))
    finally:
        logging.getLogger().removeHandler(errors)
    if not loaded:
        pytest.fail(f"the host could not load {path}:\n" + "\n".join(errors.lines), pytrace=False)
    return sys.modules.get(str(path).replace(".", "_x_"))


@pytest.fixture(scope="session")
def bare_host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The host with all its own nodes and the kit, without the pack."""
    folder = _host_folder()
    base = tmp_path_factory.mktemp("base")
    for name in ("models", "input", "output", "user", "temp", "custom_nodes"):
        (base / name).mkdir()

    if "comfy" in sys.modules or "folder_paths" in sys.modules:
        pytest.fail("the host's modules were imported before its options were set", pytrace=False)
    # The host reads its options while it is imported, so they are set first, in its own way.
    sys.path.insert(0, str(folder))
    argv, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(base), "--disable-all-custom-nodes"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  reads sys.argv
    finally:
        sys.argv = argv
    import comfy
    import folder_paths
    import nodes
    import torch

    # The kit's layers are so small that splitting them costs more than it gains; with other work on the machine the
    # threads wait for each other, and a step takes fifty times as long.
    torch.set_num_threads(1)
    assert Path(folder_paths.models_dir) == base / "models", folder_paths.models_dir
    asyncio.run(nodes.init_public_apis())
    failed = asyncio.run(nodes.init_builtin_extra_nodes())
    if failed:
        logging.getLogger(__name__).warning("stock nodes that this environment cannot import: %s", failed)
    kit = _load(nodes, _linked(base, "styleloom_kit", ROOT / "tests" / "kit"))
    return Host(folder, base, nodes.NODE_CLASS_MAPPINGS, comfy, folder_paths, kit)


@pytest.fixture(scope="session")
def pack(bare_host: Host) -> ModuleType:
    """The pack as the host loaded it (`styleloom` is a second copy, for tests without the host)."""
    import nodes

    return _load(nodes, _linked(bare_host.base, "StyleLoom", ROOT))


@pytest.fixture(scope="session")
def host(bare_host: Host, pack: ModuleType) -> Host:
    """The host with the kit and the pack."""
    return bare_host


@pytest.fixture(scope="session")
def kit(bare_host: Host) -> ModuleType:
    """The kit as the host loaded it, with its parts as attributes: `kit.diffusion.z_image_small()`."""
    for file in Path(bare_host.kit.__file__).parent.glob("[!_]*.py"):
        importlib.import_module(f"{bare_host.kit.__name__}.{file.stem}")
    return bare_host.kit


def _with_defaults(cls: type, inputs: dict[str, Any]) -> dict[str, Any]:
    """Adds the default of every widget that was not given: the frontend always sends those."""
    filled = dict(inputs)
    for kind in ("required", "optional"):
        for name, entry in (cls.INPUT_TYPES().get(kind) or {}).items():
            options = entry[1] if len(entry) > 1 and isinstance(entry[1], dict) else {}
            if name not in filled and "default" in options:
                filled[name] = options["default"]
    return filled


def _run_node(host: Host, node_id: str, inputs: dict[str, Any]) -> tuple:
    import torch
    from comfy_api.latest import io

    if node_id not in host.nodes:
        pytest.fail(f"the host has no node {node_id!r}", pytrace=False)
    cls = host.nodes[node_id]
    inputs = _with_defaults(cls, inputs)
    with torch.inference_mode():
        if issubclass(cls, io.ComfyNode):
            cls.VALIDATE_CLASS()
            clone = cls.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
            result = getattr(clone, cls.FUNCTION)(**inputs)
        else:
            result = getattr(cls(), cls.FUNCTION)(**inputs)
        if inspect.isawaitable(result):
            result = asyncio.run(_wait(result))
    if isinstance(result, io.NodeOutput):
        return tuple(result.args)
    if isinstance(result, dict):
        return tuple(result.get("result", ()))
    return tuple(result)


async def _wait(awaitable):
    return await awaitable


@pytest.fixture(scope="session")
def run_node(host: Host):
    """`run_node("NodeId", name=value, …)` → the outputs, executed in inference mode like the host does.

    Widgets that are left out take their defaults; a growing input is a dict ({"image0": …}). Stock nodes work too.
    """
    return host.run
