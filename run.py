#!/usr/bin/env python3
"""StyleLoom's two commands. Standard library only, Python 3.10 or later, Linux, macOS and Windows.

    python run.py demo [--serve] [--port N]       make a LoRA from reference images and a picture with it
    python run.py test [--no-browser] [args …]    run every test; args go to pytest (tests/unit, -k name, …)

Both prepare what is missing first, and say what they do. Which ComfyUI: COMFYUI_PATH if set; else the one
in whose custom_nodes this folder lies; else a checked copy from the package index, under .host. Which Python:
the active one if it has what that ComfyUI needs; else .venv, made once. The host runs with a base directory of
its own under .host and on 127.0.0.1 only, so nothing is written into a ComfyUI of yours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("StyleLoom needs Python 3.10 or later; this is " + sys.version.split()[0])


def _load_runner() -> None:
    """Imports the folder tests/runner/ as the package `styleloom_runner`, without a change to sys.path."""
    if "styleloom_runner" in sys.modules:
        return
    folder = Path(__file__).resolve().parent / "tests" / "runner"
    spec = importlib.util.spec_from_file_location(
        "styleloom_runner", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["styleloom_runner"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["styleloom_runner"])


_load_runner()

from styleloom_runner import browser, environment, host  # noqa: E402
from styleloom_runner.client import Client, HostError  # noqa: E402
from styleloom_runner.common import OUTPUT, ROOT, WORK, StepFailed, lock, say  # noqa: E402
from styleloom_runner.demo import Progress, describe, files_below, summary  # noqa: E402
from styleloom_runner.server import Server, make_base  # noqa: E402

__all__ = ["Client", "HostError", "Server", "StepFailed", "main", "make_base"]

DEMO = ROOT / "workflows" / "api" / "demo_image_to_lora.json"


def prepare(tests: bool) -> tuple[host.Host, environment.Environment]:
    """The ComfyUI and the Python to run it with, made or mended first if need be."""
    with lock(WORK / "prepare.lock", "Another run.py is preparing the host; waiting for it.", wait=True):
        users = host.users_host(os.environ, Path(__file__))
        chosen = host.Host(users or host.ensure_copy(WORK, environment.pip_python), own=users is None)
        found = environment.choose(chosen, tests)
    say(f"ComfyUI {chosen.version} in {chosen.path}\nPython  {found.python}")
    return chosen, found


def demo(serve: bool, port: int | None, workflow: Path) -> int:
    """Runs the demo workflow in a real host; returns the exit status."""
    if not workflow.is_file():
        raise StepFailed(f"There is no {workflow}; expected a workflow in API format. Is the checkout whole?")
    prompt = json.loads(workflow.read_text("utf-8"))
    chosen, found = prepare(tests=False)
    base = WORK / "base"
    OUTPUT.mkdir(exist_ok=True)
    busy = f"Another demo is running on {base}. Stop it first (ctrl-C in its window)."
    with lock(base / "demo.lock", busy, wait=False):
        make_base(base, ROOT)
        say("Starting ComfyUI …")
        with Server(chosen.path, base, found.python, ["--output-directory", str(OUTPUT)], port=port) as server:
            if server.failed_imports():
                raise StepFailed(f"The host could not load a pack. Its log:\n{server.log_text()}")
            before, began = files_below(OUTPUT), time.monotonic()
            with Client(server.url) as client:
                say(f"Running {workflow.name}: {len(prompt)} nodes")
                progress = Progress(prompt)
                try:
                    prompt_id = client.queue(prompt)
                    end = client.follow(prompt_id, progress.event, timeout=3600)[-1]
                except HostError as error:
                    raise StepFailed(f"ComfyUI refused {workflow.name}: {json.dumps(error.body, indent=2)}") from None
                finally:
                    progress.close()
                if end["type"] != "execution_success":
                    raise StepFailed(describe(end, prompt) + f"\nThe whole log: {server.log}")
                written = [path for path, state in files_below(OUTPUT).items() if before.get(path) != state]
                seconds = time.monotonic() - began
                say(summary(prompt, client.history(prompt_id), written, seconds, is_demo=workflow == DEMO))
            if serve:
                say(f"\nThe same ComfyUI is open at {server.url} (its Templates list StyleLoom's workflows). "
                    "Stop it with ctrl-C.")
                try:
                    server.process.wait()
                except KeyboardInterrupt:
                    say("Stopped.")
    return 0


def test(arguments: list[str]) -> int:
    """Runs pytest on every test, or on the paths among `arguments`; returns its exit status."""
    with_browser = "--no-browser" not in arguments
    arguments = [argument for argument in arguments if argument != "--no-browser"]
    chosen, found = prepare(tests=True)
    env = dict(os.environ, PYTHONUTF8="1", STYLELOOM_HOST=str(chosen.path))
    env["STYLELOOM_ACCELERATOR"] = str(int(environment.has_accelerator(found.python)))
    env["STYLELOOM_BROWSER"] = browser.obtain(found) if with_browser else "none"
    say(f"Browser {env['STYLELOOM_BROWSER']}")
    if not any(not argument.startswith("-") and (ROOT / argument.split("::")[0]).exists() for argument in arguments):
        arguments = ["tests", *arguments]
    # Not `python -m pytest`: that puts the working directory, the pack's root, on sys.path.
    code = f"{found.path_setup}\nimport pytest\nraise SystemExit(pytest.main(sys.argv[1:]))"
    process = subprocess.Popen([found.python, "-c", code, *arguments], cwd=ROOT, env=env)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # pytest has had the ctrl-C as well; let it take its servers down
        except SystemExit:
            process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
            process.wait(60)
            raise


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # a Windows console may be set to a code page
    # A shell that starts us in the background has us ignore ctrl-C, and the host would inherit that; it is told to
    # end by that very signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Ended from outside (a CI's time limit, a closed terminal): leave as after ctrl-C, so that no host stays behind.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    try:
        if arguments[:1] == ["test"] and not {"-h", "--help"} & set(arguments):
            return test(arguments[1:])
        options = _parser().parse_args(arguments)
        return demo(options.serve, options.port, options.workflow.absolute())
    except StepFailed as error:
        print(f"\nrun.py: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nrun.py: stopped. What is half made will be found and made anew.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("demo", help="make a LoRA from reference images and a picture with it")
    one.add_argument("--serve", action="store_true", help="leave ComfyUI running afterwards, to open in a browser")
    one.add_argument("--port", type=int, help="the port of the ComfyUI that is started (default: a free one)")
    one.add_argument("--workflow", type=Path, default=DEMO, help="another workflow in API format to run instead")
    two = commands.add_parser("test", help="run every test")
    two.add_argument("--no-browser", action="store_true", help="leave out the tests that need a Chromium")
    two.add_argument("arguments", nargs="*", help="anything else goes to pytest; without a path it gets `tests`")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
