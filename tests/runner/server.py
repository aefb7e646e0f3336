"""A real ComfyUI server of our own: its own base directory, its own port, and an end that is certain."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from .client import Client, HostError
from .common import WORK, StepFailed, is_junction, remove
from .environment import has_accelerator

FOLDERS = ("models", "input", "output", "user", "temp", "custom_nodes")
COLOUR = re.compile("\x1b\\[[0-9;]*m")
START_SECONDS = 300  # a first start on a slow disk compiles a few thousand files


def make_base(base: Path, repo: Path) -> Path:
    """Makes `base` a base directory for the host and links the pack and the tests' kit into its custom_nodes.

    Keeps whatever is in it. The links are StyleLoom → `repo` and styleloom_kit → `repo`/tests/kit (if that is
    there: an archive of the pack may come without its tests). Returns `base`.
    """
    base, repo = Path(base), Path(repo)
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    packs = {"StyleLoom": repo, "styleloom_kit": repo / "tests" / "kit"}
    for name, target in packs.items():
        remove(base / "custom_nodes" / name)  # it may point to where the pack used to be
        if target.is_dir():
            link(target.resolve(), base / "custom_nodes" / name)
    return base


def link(target: Path, place: Path) -> None:
    """Makes `place` show the folder `target`: a symlink, on Windows a junction (which needs no special right).

    Where the file system knows neither, a copy: it must be made anew when the pack changes, as make_base does.
    """
    try:
        if os.name == "nt":
            import _winapi

            _winapi.CreateJunction(str(target), str(place))
        else:
            os.symlink(target, place, target_is_directory=True)
    except OSError:
        skip = shutil.ignore_patterns(".git", ".venv", ".host", "output", "__pycache__", ".pytest_cache")
        shutil.copytree(target, place, ignore=skip)


def is_link(place: Path) -> bool:
    return place.is_symlink() or is_junction(place)


class Server:
    """One ComfyUI process, as a context manager: started on entry, surely gone on exit.

    host: the ComfyUI folder. base: its base directory (make_base). python: the interpreter to run it with.
    extra_args: more arguments for main.py. log: where its output goes (default: server.log in `base`).
    port: default a free one. It binds to 127.0.0.1 only, has no API nodes, and loads exactly the packs in
    base/custom_nodes. Entry raises StepFailed with the end of the log when the host dies or never answers.
    """

    def __init__(self, host: Path, base: Path, python: str = sys.executable, extra_args=(), log: Path | None = None,
                 port: int | None = None):
        self.host, self.base, self.python = Path(host), Path(base).absolute(), str(python)
        self.extra_args = [str(argument) for argument in extra_args]
        self.log = Path(log) if log else self.base / "server.log"
        self.port = port or free_port()
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_text(self) -> str:
        """Everything the host has printed so far, without the colours that it writes even to a file."""
        return COLOUR.sub("", self.log.read_text("utf-8", errors="replace")) if self.log.exists() else ""

    def failed_imports(self) -> list[str]:
        """The log's line for each pack in base/custom_nodes that the host could not load."""
        return [line.strip() for line in self.log_text().splitlines() if "FAILED): " in line]

    def command(self) -> list[str]:
        """The whole command line. Flags that this version of the host does not know are left out."""
        packs = sorted(entry.name for entry in (self.base / "custom_nodes").iterdir() if entry.name != "__pycache__")
        # The base directory does not move the database, and a user's own extra_model_paths.yaml beside main.py
        # is read in any case: its models are harmless, its packs are kept out by the list of packs to load.
        flags = [["--base-directory", str(self.base)], ["--listen", "127.0.0.1"], ["--port", str(self.port)],
                 ["--disable-auto-launch"], ["--disable-api-nodes"], ["--database-url", "sqlite:///:memory:"],
                 ["--disable-all-custom-nodes"], ["--whitelist-custom-nodes", *packs] if packs else []]
        if "--cpu" not in self.extra_args and not has_accelerator(self.python):
            flags.append(["--cpu"])
        known = (self.host / "comfy" / "cli_args.py").read_text("utf-8")
        if '"--base-directory"' not in known:
            raise StepFailed(f"The ComfyUI in {self.host} is too old to be given a base directory of its own. "
                             "Update it, or unset COMFYUI_PATH to use the copy from the package index.")
        if '"--whitelist-custom-nodes"' not in known:
            flags = [flag for flag in flags if flag[:1] != ["--disable-all-custom-nodes"]]
        known_flags = [flag for flag in flags if flag and f'"{flag[0]}"' in known]
        return [self.python, str(self.host / "main.py"), *sum(known_flags, []), *self.extra_args]

    def _environ(self) -> dict:
        env = dict(os.environ, PYTHONUTF8="1", PYTHONUNBUFFERED="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1",
                   TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
        if WORK not in self.host.parents:
            env["PYTHONDONTWRITEBYTECODE"] = "1"  # not even compiled files into the user's ComfyUI
        return env

    def __enter__(self) -> Server:
        command = self.command()
        if answers(self.port):  # it may be the user's own ComfyUI, and must not be taken for ours
            raise StepFailed(f"Something else already listens on 127.0.0.1:{self.port}. Name another port, or none.")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # A group of its own: a ctrl-C at the terminal reaches run.py or pytest alone, which then stops the host,
        # and whatever the host started can be ended with it.
        windows = os.name == "nt"
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if windows else {"start_new_session": True}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                            cwd=self.base, env=self._environ(), **group)
        try:
            self._await_answer()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _await_answer(self) -> None:
        with Client(self.url) as client:
            self._await(client, time.monotonic() + START_SECONDS)

    def _await(self, client: Client, end: float) -> None:
        while True:
            if self.process.poll() is not None:
                raise StepFailed(f"ComfyUI in {self.host} ended at once (code {self.process.returncode}). The end of "
                                 f"its log, {self.log}:\n{self._tail()}")
            try:
                client.get("/system_stats")
                return
            except (OSError, HostError):
                if time.monotonic() > end:
                    raise StepFailed(f"ComfyUI in {self.host} did not answer within {START_SECONDS} s. The end of its "
                                     f"log, {self.log}:\n{self._tail()}") from None
            time.sleep(0.1)

    def _tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def stop(self) -> None:
        """Ends the host and all it started: first politely (it then clears its temp folder), then by force."""
        if self.process is None or self.process.poll() is not None:
            return
        if os.name == "nt":
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(self.process.pid)], capture_output=True)
        else:
            self._signal(signal.SIGINT)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                pass
            self._signal(signal.SIGKILL)
        self.process.wait(30)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says the latter of a group that is all zombies
            pass


def answers(port: int) -> bool:
    """True when something listens on that port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
