"""Places, plain words on the screen, and the few system helpers that every step needs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".host"  # everything fetched or written for the host; git-ignored
VENV = ROOT / ".venv"  # git-ignored
OUTPUT = ROOT / "output"  # git-ignored


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
    """True where Debian packages can be installed without asking anyone: root, with apt-get."""
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("apt-get") is not None


def apt_install(*packages: str) -> bool:
    """Installs Debian packages; True if apt-get says so. A bare machine has no package lists, so they come first."""
    say(f"Installing the Debian package {' '.join(packages)}.")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    subprocess.run(["apt-get", "update", "-q"], env=env)  # a stale list may still do; the install is what counts
    done = subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages], env=env)
    return done.returncode == 0
