#!/usr/bin/env python3
"""StyleLoom's commands. Standard library only, Python 3.10 or later, Linux, macOS and Windows.

    python run.py demo [--serve] [--port N]       make a LoRA from reference images and a picture with it
    python run.py test [--no-browser] [args …]    run every test; args go to pytest (tests/unit, -k name, …)
    python run.py convert-workflow FILE [--out F] rewrite a workflow of IPAdapter Plus to StyleLoom's nodes

The last one reads one file and writes another. The others prepare what is missing first, and say what they do. Before
a package of the system is installed as root they ask; --yes says yes beforehand, and so does CI=true in the
environment. Which ComfyUI: COMFYUI_PATH if set; else the one
in whose custom_nodes this folder lies; else a checked copy from the package index, under .host. Which Python:
the active one if it has what that ComfyUI needs; else .venv, made once. The host runs with a base directory of
its own under .host and on 127.0.0.1 only, so nothing is written into a ComfyUI of yours.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("StyleLoom needs Python 3.10 or later; this is " + sys.version.split()[0])


def _load_package(name: str, folder: Path) -> None:
    """Imports a folder as a package of another name, without a change to sys.path."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_load_package("styleloom_runner", Path(__file__).resolve().parent / "tests" / "runner")

from styleloom_runner import browser, environment, host, parts  # noqa: E402
from styleloom_runner.common import DEMO, ROOT, WORK, YES, StepFailed, as_command, await_all, lock, say  # noqa: E402


def prepare(tests: bool) -> tuple[host.Host, environment.Environment]:
    """The ComfyUI and the Python to run it with, made or mended first if need be."""
    with lock(WORK / "prepare.lock", "Another run.py is preparing the host; waiting for it.", wait=True):
        users = host.users_host(os.environ, Path(__file__))
        chosen = host.Host(users or host.ensure_copy(WORK, environment.pip_python), own=users is None)
        found = environment.choose(chosen, tests)
    say(f"ComfyUI {chosen.version} in {chosen.path}\nPython  {found.python}")
    return chosen, found


def demo(serve: bool, port: int | None, workflow: Path) -> int:
    """Runs the demo workflow in a real host, from the prepared Python; returns the exit status."""
    if not workflow.is_file():
        raise StepFailed(f"There is no {workflow}; expected a workflow in API format. Is the checkout whole?")
    chosen, found = prepare(tests=False)
    # tests/ and not the root is put on the path: the root holds a folder `nodes`.
    code = f"sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom runner import demo\nsys.exit(demo.main(sys.argv[1:]))"
    options = [*(["--serve"] if serve else []), *(["--port", str(port)] if port else [])]
    process = subprocess.Popen(found.command(code, str(chosen.path), str(workflow), *options),
                               env=dict(os.environ, PYTHONUTF8="1"))
    await_all([process])
    return process.returncode


def test(arguments: list[str]) -> int:
    """Runs pytest on every test, or on the paths among `arguments`; returns its exit status."""
    with_browser = "--no-browser" not in arguments
    arguments = [argument for argument in arguments if argument not in ("--no-browser", "--yes")]
    chosen, found = prepare(tests=True)
    env = dict(os.environ, PYTHONUTF8="1", STYLELOOM_HOST=str(chosen.path))
    env["STYLELOOM_ACCELERATOR"] = str(int(environment.has_accelerator(found.python)))
    env["STYLELOOM_BROWSER"] = browser.obtain(found) if with_browser else "none"
    say(f"Browser {env['STYLELOOM_BROWSER']}")
    return parts.run(found, env, parts.parts_of(arguments))


def load_convert() -> None:
    """Imports the folder workflows/convert/ as the package `styleloom_convert`."""
    _load_package("styleloom_convert", ROOT / "workflows" / "convert")


def convert_workflow(path: Path, out: Path | None, base: str | None) -> int:
    """Rewrites a workflow of IPAdapter Plus; says what was done and what has no counterpart."""
    load_convert()
    from styleloom_convert.command import main as convert
    from styleloom_convert.graph import Unreadable

    try:
        say(convert(path, out, base))
    except Unreadable as error:
        raise StepFailed(str(error)) from error
    return 0


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    return as_command(lambda: _command(arguments))


def _command(arguments: list[str]) -> int:
    if "--yes" in arguments:
        os.environ[YES] = "1"
    if arguments[:1] == ["test"] and not {"-h", "--help"} & set(arguments):
        return test(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.command == "convert-workflow":
        return convert_workflow(options.file, options.out, options.base)
    return demo(options.serve, options.port, options.workflow.absolute())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("demo", help="make a LoRA from reference images and a picture with it")
    one.add_argument("--serve", action="store_true", help="leave ComfyUI running afterwards, to open in a browser")
    one.add_argument("--port", type=int, help="the port of the ComfyUI that is started (default: a free one)")
    one.add_argument("--workflow", type=Path, default=DEMO, help="another workflow in API format to run instead")
    one.add_argument("--yes", action="store_true", help="install packages of the system without asking, if need be")
    two = commands.add_parser("test", help="run every test")
    two.add_argument("--no-browser", action="store_true", help="leave out the tests that need a Chromium")
    two.add_argument("--yes", action="store_true", help="install packages of the system without asking, if need be")
    two.add_argument("arguments", nargs="*", help="anything else goes to pytest; without a path it gets `tests`")
    three = commands.add_parser("convert-workflow", help="rewrite a workflow of IPAdapter Plus to StyleLoom's nodes")
    three.add_argument("file", type=Path, help="a workflow (.json) as ComfyUI saves it, or in API format")
    three.add_argument("--out", type=Path, help="where to write it (default: beside it, with _styleloom in its name)")
    three.add_argument("--base", choices=("sdxl", "sd1.5"), help="which adapter files Unified Loader stands for "
                       "(default: read from the workflow)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
