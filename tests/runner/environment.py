"""Which Python runs the host: the active one if it has what the host needs, else a `.venv` made for it."""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .common import ROOT, VENV, WORK, StepFailed, apt_install, can_apt, read_stamp, remove, say, write_whole
from .host import Host

# The one set of the three that the package index has as builds going together, with and without a GPU.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# What Linux shows a program that has a GPU to use: NVIDIA's (cards, WSL, Jetson), AMD's and Intel's.
GPU_DEVICES = ("nvidia*", "dxg", "nvhost*", "nvgpu*", "nvmap", "kfd", "dri/render*")
TEST_REQUIREMENTS = ROOT / "tests" / "requirements.txt"

# Runs in the interpreter that is asked about. `packaging` comes with the host's requirements (transformers
# needs it), so an interpreter without it lacks them anyway. Nothing heavy is imported when something is missing.
PROBE = """
import importlib.metadata, json, sys
out = {"missing": [], "unfit": [], "error": None, "accelerator": None}
files = sys.argv[2:]
try:
    from packaging.requirements import Requirement
except ImportError:
    out["missing"] += ["packaging"] if files else []
    files = []
for file in files:
    for line in open(file, encoding="utf-8"):
        line = line.split("#")[0].strip()
        if not line or line.startswith("-"):
            continue
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            out["missing"].append(wanted.name)
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            out["unfit"].append(f"{wanted.name} {version} (asked for: {wanted.specifier})")
if sys.argv[1] != "look" and not out["missing"]:
    try:
        import torch
        if sys.argv[1] == "import":
            import torchvision, torchaudio
        out["accelerator"] = bool(torch.cuda.is_available() or torch.backends.mps.is_available()
                                  or (hasattr(torch, "xpu") and torch.xpu.is_available()))
    except Exception as error:
        out["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(out))
"""


@dataclass(frozen=True)
class Environment:
    """`python` runs the host. `tools` is a folder to put first on the path of the test run only, or None."""

    python: str
    tools: Path | None = None

    def command(self, code: str, *arguments: str) -> list[str]:
        """The command that runs `code` in this environment."""
        return [self.python, "-c", f"{self.path_setup}\n{code}", *arguments]

    @property
    def path_setup(self) -> str:
        """Code to begin a `python -c` with: it takes the working directory, which -c (and -m) put first, off the
        path again, and puts the test tools there. PYTHONPATH would not do: the Python that comes with ComfyUI's
        Windows download does not read it."""
        return f"import sys; sys.path[:1] = {[str(self.tools)] if self.tools else []!r}"


def probe(python: str, requirements: tuple[Path, ...], mode: str = "import") -> dict:
    """What `python` has of the requirement files: {missing, unfit, error, accelerator}; see PROBE.

    mode: "look" imports nothing, "torch" asks torch for an accelerator, "import" tries the whole torch set.
    """
    command = [python, "-c", PROBE, mode, *map(str, requirements)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", cwd=WORK)
    if done.returncode != 0:
        return {"missing": [], "unfit": [], "error": done.stderr.strip()[-2000:] or "it ended", "accelerator": None}
    return json.loads(done.stdout.strip().splitlines()[-1])


@functools.cache
def has_accelerator(python: str) -> bool:
    """True when torch in `python` sees a GPU (CUDA, ROCm, XPU or Apple's Metal). StepFailed if it does not import."""
    known = os.environ.get("STYLELOOM_ACCELERATOR")  # set by `run.py test` so that no server asks again
    if known in ("0", "1"):
        return known == "1"
    if sys.platform == "linux" and not any(glob.glob(f"/dev/{pattern}") for pattern in GPU_DEVICES):
        return False  # saves the seconds that it takes to import torch
    WORK.mkdir(exist_ok=True)
    found = probe(python, (), "torch")
    if found["error"]:
        raise StepFailed(f"torch does not work in {python}:\n{found['error']}")
    return bool(found["accelerator"])


def choose(host: Host, tests: bool) -> Environment:
    """The environment for `host`, made first if need be; with `tests`, one that has the test tools too."""
    WORK.mkdir(exist_ok=True)
    in_venv = Path(sys.prefix).resolve() == VENV.resolve()
    key = _key(host)
    fault = venv_fault(VENV, key)
    if not (in_venv and fault is None) and _active_works(host):
        return Environment(sys.executable, _tools_folder() if tests and not _has_test_tools() else None)
    if fault is None:
        return Environment(str(venv_python(VENV)))
    if in_venv:
        # It cannot be removed from under the feet of the Python that runs this very line.
        raise StepFailed(f"This Python belongs to {VENV}, which cannot be used: {fault}.\n"
                         "Run the same command with the Python that lies outside (deactivate it first).")
    _make_venv(host, key, fault)
    return Environment(str(venv_python(VENV)))


def _active_works(host: Host) -> bool:
    found = probe(sys.executable, (host.path / "requirements.txt",))
    if found["missing"] or found["error"]:
        if found["error"]:
            say(f"The active Python has the host's packages but cannot use them: {found['error'].splitlines()[-1]}")
        return False
    if found["unfit"]:
        if host.own:
            return False  # nobody chose these versions for this host; a fitting set is made instead
        # The user's own ComfyUI in the user's own environment: theirs to decide, ours to mention.
        say("Note: versions other than this ComfyUI asks for: " + "; ".join(found["unfit"]))
    return True


def _has_test_tools() -> bool:
    found = probe(sys.executable, (TEST_REQUIREMENTS,), "look")
    return not (found["missing"] or found["unfit"] or found["error"])


def _tools_folder() -> Path:
    """The test tools in a folder of their own, for an active environment that lacks them.

    Nothing is installed into an environment that the user made. A venv over it would not see its packages
    (`--system-site-packages` means those of the base interpreter), so the folder goes on the path of the
    test run instead.
    """
    folder = WORK / f"test-tools-{sys.version_info[0]}.{sys.version_info[1]}"
    stamp = folder / "styleloom.json"
    key = _digest(TEST_REQUIREMENTS.read_text("utf-8"), sys.platform, platform.machine())
    if read_stamp(stamp).get("key") != key:
        say(f"Fetching the test tools into {folder}; your environment is left as it is.")
        remove(folder)
        _pip(pip_python(), ["--target", str(folder), "--requirement", str(TEST_REQUIREMENTS)], "the test tools")
        write_whole(stamp, {"key": key})
    return folder


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_fault(venv: Path, key: str) -> str | None:
    """None when `venv` was finished for exactly this key and nothing has left it since; else what is wrong."""
    stamp = read_stamp(venv / "styleloom.json")
    if not stamp:
        return "it was never finished" if venv.exists() else "it is not there"
    if stamp.get("key") != key:
        return "it was made for other versions"
    if not venv_python(venv).exists():
        return "its Python is gone"
    gone = sorted(set(stamp.get("packages", ["?"])) - set(_packages(venv)))
    return f"packages have gone from it: {', '.join(gone[:5])}" if gone else None


def _packages(venv: Path) -> list[str]:
    """The names of the installed packages' metadata folders: a cheap way to see that something was removed."""
    folder = "Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"
    return sorted(path.name for path in venv.glob(f"{folder}/*.dist-info"))


def _key(host: Host) -> str:
    requirements = (host.path / "requirements.txt").read_text("utf-8")
    machine = f"{sys.version_info[:2]} {sys.implementation.name} {sys.platform} {platform.machine()}"
    return _digest(*TORCH, requirements, TEST_REQUIREMENTS.read_text("utf-8"), machine)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()


def _make_venv(host: Host, key: str, fault: str) -> None:
    if VENV.exists():
        say(f"Removing {VENV}: {fault}.")
        remove(VENV)
    free = shutil.disk_usage(ROOT).free
    if sys.platform == "linux" and free < 8e9:
        raise StepFailed(f"The environment needs about 7 GB, and {ROOT} has {free / 1e9:.1f} GB free.")
    say(f"Making {VENV} for the host: about 6 GB and a few minutes, once.")
    _bare_venv(VENV)
    # One call for everything, so that no later requirement can move the torch set.
    wanted = [*TORCH, "--requirement", str(host.path / "requirements.txt"), "--requirement", str(TEST_REQUIREMENTS)]
    _pip(str(venv_python(VENV)), wanted, "the host's requirements")
    found = probe(str(venv_python(VENV)), (host.path / "requirements.txt", TEST_REQUIREMENTS))
    if found["missing"] or found["unfit"] or found["error"]:
        raise StepFailed(f"{VENV} was filled but does not work: {json.dumps(found)}\nRun the same command again; it "
                         "will be made anew. Or run it with the Python of a ComfyUI that works.")
    write_whole(VENV / "styleloom.json", {"key": key, "packages": _packages(VENV)})  # last: no stamp, no environment


def _bare_venv(folder: Path) -> None:
    # Debian splits ensurepip off; without it a venv would have no pip.
    by_hand = "On Debian and Ubuntu: apt install python3-venv. Then run the same command again."
    if importlib.util.find_spec("ensurepip") is None and not (can_apt() and apt_install("python3-venv", by_hand)):
        raise StepFailed(f"{sys.executable} cannot make virtual environments (it has no ensurepip).\n{by_hand}")
    if subprocess.run([sys.executable, "-m", "venv", str(folder)]).returncode != 0:
        raise StepFailed(f"{sys.executable} could not make a virtual environment in {folder}; its words are above.")


def pip_python() -> str:
    """An interpreter with pip: the active one, else that of a small virtual environment kept for it."""
    WORK.mkdir(exist_ok=True)
    works = [sys.executable, "-m", "pip", "--version"]
    if subprocess.run(works, capture_output=True, cwd=WORK).returncode == 0:
        return sys.executable
    folder = WORK / "pip-venv"
    works[0] = str(venv_python(folder))
    if not venv_python(folder).exists() or subprocess.run(works, capture_output=True, cwd=WORK).returncode != 0:
        remove(folder)
        _bare_venv(folder)
    return works[0]


def _pip(python: str, arguments: list[str], what: str) -> None:
    # A user's settings for another place to install to would break an environment of our own.
    env = {name: value for name, value in os.environ.items() if name not in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX")}
    command = [python, "-m", "pip", "install", "--quiet", "--progress-bar", "off", "--no-input",
               "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env=env).returncode != 0:
        raise StepFailed(
            f"pip could not install {what}; its own words are above. Run the same command again: what is half made is "
            f"found and made anew.\nIf it finds no matching torch: the index has {TORCH[0]} for Python 3.10 to 3.14 on "
            "Linux and Windows (64 bit) and on Macs with Apple's chips. Use such a Python, or run this with the "
            "Python of a ComfyUI that works."
        )
