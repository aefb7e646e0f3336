"""The rooms of the pack, the tree's hash, and copies of the tree in which a mutant may be written."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

WARM = "test_warm_for_mutants.py"  # written into a copy: brings up what every test needs, once
LEFT_OUT = {"__pycache__", "output", "node_modules"}
HASHED = {".py", ".json", ".toml"}


@dataclass(frozen=True)
class Room:
    """A part of the pack and the tests that judge it.

    Attributes:
        sources: Folder or folders with the code.
        tests: Folder with the tests.
        fixtures: Session fixtures that are slow, know nothing of the pack, and are brought up once for all mutants.
        imports: Modules of others to import before the first mutant.
        without: Files of tests that run nothing of the pack.
    """

    name: str
    sources: tuple[str, ...]
    tests: str
    fixtures: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def has(self, file: str) -> bool:
        return any(file.startswith(folder + "/") for folder in self.sources)


ROOMS = {
    "weights": Room("weights", ("weights",), "tests/unit", imports=(
        "torch", "numpy", "einops", "safetensors.torch", "PIL.Image", "hypothesis.strategies")),
    "host": Room("host", ("nodes/host",), "tests/host", ("bare_host",), without=("test_kit.py",)),
}


def files_of(root: Path) -> list[str]:
    """Every file of the tree, relative to it with `/`, without hidden folders and what is made by running."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT and not name.startswith("."))
        relative = Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in sorted(names) if name != WARM]
    return found


def tree_hash(root: Path, room: Room, rooms: list[Room]) -> str:
    """Hash of what the room's verdicts hang on: all code and settings, but not the benchmarks and others' tests."""
    others = tuple(other.tests + "/" for other in rooms if other.tests != room.tests)
    digest = hashlib.sha256()
    for file in files_of(root):
        if Path(file).suffix in HASHED and not file.startswith(("benchmarks/", *others)):
            digest.update(file.encode() + b"\0" + (root / file).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def make_copy(root: Path, copy: Path, rooms: list[Room]) -> None:
    """Makes `copy` equal to the tree. What is equal already stays, with its compiled files."""
    wanted = files_of(root)
    for file in wanted:
        source, target = root / file, copy / file
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        elif target.stat().st_mtime != source.stat().st_mtime:
            shutil.copystat(source, target)
    for file in set(files_of(copy)) - set(wanted):
        (copy / file).unlink()
    for room in rooms:
        fixtures = ", ".join(room.fixtures)
        text = f"def test_warm({fixtures}):\n    pass\n\n\ndef test_after():\n    pass\n"
        (copy / room.tests / WARM).write_text(text, "utf-8")
