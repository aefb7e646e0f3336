"""Places, plain words on the screen, and the few system helpers that every step needs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".host"  # everything fetched or written for the host; git-ignored
VENV = ROOT / ".venv"  # git-ignored
OUTPUT = ROOT / "output"  # git-ignored
DEMO = ROOT / "workflows" / "api" / "demo_image_to_lora.json"


class StepFailed(RuntimeError):
    """A step of run.py could not be done; the text says what was found and what to do about it."""


def say(text: str) -> None:
    """Prints one plain line at once, so that it stands before the output of the programs started next."""
    print(text, flush=True)


def write_whole(path: Path, data: dict) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(data), encoding="utf-8")
    os.replace(part, path)


def read_stamp(path: Path) -> dict:
    """The stamp at `path`, or {} when it is absent or not whole: both mean that the work must be done again."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def remove(path: Path) -> None:
    """Removes a file, a link or junction (never what it points to), or a whole folder; absent is fine."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif is_junction(path):
        os.rmdir(path)
    elif path.is_dir():
        shutil.rmtree(path)


def is_junction(path: Path) -> bool:
    """True for a Windows directory junction, which is_symlink does not report before Python 3.12."""
    try:
        return getattr(os.lstat(path), "st_reparse_tag", 0) == 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def lock(path: Path, busy: str, wait: bool):
    """Holds `path` as a lock; the system lets go of it when this process dies, however it dies.

    When another process holds it, prints `busy` and waits, or with wait=False raises StepFailed(busy).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        told = False
        while not _try_lock(file):
            if not wait:
                raise StepFailed(busy)
            if not told:
                say(busy)
                told = True
            time.sleep(0.3)
        yield  # closing the file lets go


def _try_lock(file) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def can_apt() -> bool:
    """True where this program has the right to install Debian packages: Linux, root, with apt-get."""
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get") is not None


YES = "STYLELOOM_YES"  # set by --yes, or by a yes to the question; a name in the environment, so that children know it


def ask_to_install(what: str, by_hand: str) -> None:
    """Asks before anything is installed on the system as root: returns on a yes, else raises StepFailed.

    `what` is what would be installed, `by_hand` how the user can do it or do without. A yes counts for the whole
    run. --yes and a CI (CI=true in the environment) have said it already. Without a terminal nobody can be asked.
    """
    if os.environ.get(YES) == "1" or os.environ.get("CI", "").lower() in ("true", "1"):
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise StepFailed(f"{what} would have to be installed on this system as root, and there is no terminal to ask "
                         f"you at. Pass --yes to allow it, or do this instead: {by_hand}")
    try:
        answer = input(f"Install {what} on this system as root? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise StepFailed(f"{what} was not installed, as you said. {by_hand}")
    os.environ[YES] = "1"


def apt_install(package: str, by_hand: str) -> bool:
    """Installs a Debian package after asking (see ask_to_install); True if apt-get says so."""
    ask_to_install(f"the Debian package {package}", by_hand)
    say(f"Installing the Debian package {package}.")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    # A bare machine has no package lists, so they come first. A stale list may still do; the install is what counts.
    subprocess.run(["apt-get", "update", "-q"], env=env)
    done = subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", package], env=env)
    return done.returncode == 0


def as_command(work: Callable[[], int]) -> int:
    """Runs the body of a program; returns its exit status. Failed steps and ctrl-C end it in plain words."""
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
        return work()
    except StepFailed as error:
        print(f"\nrun.py: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nrun.py: stopped. What is half made will be found and made anew.", file=sys.stderr)
        return 130


def await_all(processes: list[subprocess.Popen], meanwhile: Callable[[], None] | None = None) -> None:
    """Waits for the end of every process. They share our terminal, and take down what they have started themselves.

    `meanwhile()` is called a few times a second. At ctrl-C the processes have had it as well, so this goes on waiting.
    When this program is told to end, they are told too.
    """
    while True:
        try:
            for process in processes:
                _await(process, meanwhile)
            return
        except KeyboardInterrupt:
            continue
        except SystemExit:
            living = [process for process in processes if process.poll() is None]
            for process in living:
                process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
            for process in living:
                process.wait(60)
            raise


def _await(process: subprocess.Popen, meanwhile: Callable[[], None] | None) -> None:
    while True:
        try:
            process.wait(0.3 if meanwhile else None)
            return
        except subprocess.TimeoutExpired:
            meanwhile()
