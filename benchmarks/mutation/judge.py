"""Judging mutants: a copy of the tree and a warm process for each job, and what its tests say of each mutant."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from .coverage_map import Map
from .mutants import Mutant
from .tree import WARM, Room, make_copy

HERE = Path(__file__).resolve().parent
BOOT = """
import importlib.util, sys
sys.path[:] = [entry for entry in sys.path if entry]  # the pack's root must not be there
spec = importlib.util.spec_from_file_location(
    "styleloom_mutation", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
from styleloom_mutation.worker import main
raise SystemExit(main(sys.argv[2:]))
"""


class CannotJudge(Exception):
    """Why the tests cannot be run at all."""


def environment() -> dict[str, str]:
    """One thread for each process; no browser."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONUTF8": "1", "STYLELOOM_BROWSER": "none"}


def can_fork() -> bool:
    return sys.platform == "linux"


class Workplace:
    """One job's folder: a copy of the tree, a folder for temporary files, and a log."""

    def __init__(self, folder: Path, root: Path, rooms: list[Room]):
        self.tree, self.folder = folder / "tree", folder
        self.log = folder / "log.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        make_copy(root, self.tree, rooms)
        # Kept here, so that an edit of the checkout meanwhile does not reach the copy.
        self.originals = {path.relative_to(self.tree).as_posix(): (path.read_bytes(), path.stat().st_mtime)
                          for room in rooms for source in room.sources for path in (self.tree / source).rglob("*.py")}
        self.product = [source for room in rooms for source in room.sources]
        self.count = itertools.count(1)

    def start(self, do: str, room: Room, paths: list[str], **more) -> subprocess.Popen:
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        task = {"do": do, "paths": paths, "product": self.product, "imports": list(room.imports),
                "without": list(room.without),
                "basetemp": str(self.folder / "tmp"), "result": str(self.folder / "result.json"), **more}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", BOOT, str(HERE), json.dumps(task)], cwd=self.tree, env=environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE if do == "serve" else log, stderr=log, text=True,
                start_new_session=os.name != "nt",
            )  # fmt: skip

    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text("utf-8"))

    def change(self, mutant: Mutant) -> None:
        """Writes the mutant into the copy, with a time of its own, or the compiled file of the original would do."""
        source, stamp = self.originals[mutant.file]
        self._write(mutant.file, mutant.applied(source), int(stamp) + 10 * next(self.count))

    def restore(self, mutant: Mutant) -> None:
        self._write(mutant.file, *self.originals[mutant.file])

    def _write(self, file: str, text: bytes, stamp: float) -> None:
        (self.tree / file).write_bytes(text)
        os.utime(self.tree / file, (stamp, stamp))


def record(place: Workplace, room: Room, paths: list[str], target: Path) -> None:
    """Runs the room's tests once under the trace function and writes the map to `target`."""
    (place.folder / "result.json").unlink(missing_ok=True)
    process = place.start("record", room, paths)
    try:
        status = process.wait()
    finally:
        _end(process)
    if status not in (0, 1) or not (place.folder / "result.json").is_file():
        raise CannotJudge(f"the tests in {', '.join(paths)} cannot be run (pytest's status {status}); "
                          f"see the end of {place.log}")
    if not place.result()["tests"]:
        raise CannotJudge(f"no test in {', '.join(paths)} passes; see the end of {place.log}")
    shutil.copyfile(place.folder / "result.json", target)


class Tests:
    """Runs chosen tests in one workplace: by forks of a warm process, or by a new process each time."""

    def __init__(self, place: Workplace, room: Room, fork: bool):
        self.place, self.room, self.fork = place, room, fork
        self.process: subprocess.Popen | None = None

    def run(self, tests: list[str], limit: float) -> dict:
        """Up to the first failure. Keys: outcome (passed, killed, timeout), by, why."""
        return self._forked(tests, limit) if self.fork else self._once(tests, limit)

    def _forked(self, tests: list[str], limit: float) -> dict:
        if self.process is None:
            self.process = self.place.start("serve", self.room, [f"{self.room.tests}/{WARM}"])
            hello = self._read()
            if "error" in hello:
                raise CannotJudge(f"{self.room.tests}: {hello['error']}; see {self.place.log}")
        self.process.stdin.write(json.dumps({"tests": tests, "limit": limit}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise CannotJudge(f"the warm process for {self.room.tests} has ended; see the end of {self.place.log}")
        return json.loads(line)

    def _once(self, tests: list[str], limit: float) -> dict:
        (self.place.folder / "result.json").unlink(missing_ok=True)
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        process = self.place.start("once", self.room, files, tests=tests)
        try:
            process.wait(limit + 30)  # the start of Python and of the host comes on top
        except subprocess.TimeoutExpired:
            return {"outcome": "timeout", "by": None, "why": f"over {limit + 30:.0f} s"}
        finally:
            _end(process)
        if not (self.place.folder / "result.json").is_file():
            return {"outcome": "killed", "by": "a crash of the process", "why": f"exit status {process.returncode}"}
        return self.place.result()

    def close(self) -> None:
        if self.process is not None:
            _end(self.process)
            self.process = None


def _end(process: subprocess.Popen) -> None:
    """Ends a process, whatever it is doing."""
    if process.stdin:
        process.stdin.close()
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


class Judge:
    """Judges mutants by the maps of the tiers. One lives for all jobs; `judge` may be called by several threads.

    A test that fails, or a run that is too slow, counts only if the same tests pass in time on the code as it is. A
    test that does not is left out for good (it needs another test before it) and the mutant judged anew. `budget`:
    how many seconds of tests a mutant meets at most; 0 for all that run its line.
    """

    def __init__(self, maps: dict[str, Map], rooms: dict[str, Room], budget: float = 0):
        self.maps, self.rooms, self.budget = maps, rooms, budget
        self.sound: set[tuple[str, str]] = set()
        self.unsound: set[tuple[str, str]] = set()
        self.lock = threading.Lock()

    def room_for(self, mutant: Mutant) -> tuple[str, str]:
        """The name of the room whose tests judge, and a remark where those are another room's."""
        own = next(name for name, room in self.rooms.items() if room.has(mutant.file))
        mine = self.maps.get(own)
        if mine and mine.runs_functions_of(mutant.file):
            return own, ""
        for name, other in self.maps.items():
            if name != own and other.runs_functions_of(mutant.file):
                return name, f"only {self.rooms[name].tests} run this file"
        return own, ""

    def judge(self, mutant: Mutant, tests: dict[str, Tests]) -> dict:
        """The verdict: outcome, by, why, note, tests (how many could fail), ran_in."""
        name, note = self.room_for(mutant)
        if name not in self.maps:
            raise CannotJudge(f"there is no record of {self.rooms[name].tests}")
        record = self.maps[name]
        acting = record.tests_for(mutant.file, mutant.span, mutant.at_import)
        numbers = [number for number in acting if (name, record.tests[number]["id"]) not in self.unsound]
        all_of_them = len(numbers)
        while self.budget and len(numbers) > 1 and record.seconds(numbers) > self.budget:
            numbers.pop()
        met = f"met only the cheapest {len(numbers)} of {all_of_them} tests" if len(numbers) < all_of_them else ""
        budget = self.budget if len(numbers) < all_of_them else 0
        said = {"note": note, "ran_in": name, "tests": len(numbers), "budget": budget, "by": None, "why": ""}
        if acting and not numbers:
            return {**said, "outcome": "unjudged", "why": "its tests fail without the mutant, run alone"}
        if not numbers:
            others = [f"{len(found)} tests in {self.rooms[other].tests} run it" for other, its in self.maps.items()
                      if other != name and (found := its.runs(mutant.file, mutant.span))]
            return {**said, "outcome": "not covered", "why": "; ".join(others)}
        place = tests[name].place
        for batch in record.batches(numbers):
            ids = [record.tests[number]["id"] for number in batch]
            limit = 3 * record.seconds(batch) + 10
            place.change(mutant)
            try:
                answer = tests[name].run(ids, limit)
            finally:
                place.restore(mutant)
            if answer["outcome"] == "passed":
                continue
            if answer["outcome"] == "timeout":
                if tests[name].run(ids, limit)["outcome"] == "timeout":
                    return {**said, "outcome": "unjudged", "why": "the tests are too slow without the mutant as well"}
            elif not self._is_sound(name, answer["by"], limit, tests[name]):
                return self.judge(mutant, tests)
            return {**said, **{key: answer[key] for key in ("outcome", "by", "why")}, "budget": 0}
        return {**said, "outcome": "survived", "why": met}

    def _is_sound(self, name: str, test: str, limit: float, tests: Tests) -> bool:
        """Whether a test passes on the code as it is, run alone."""
        key = (name, test)
        if "::" not in test or key in self.sound:  # a file that cannot be imported, or a crash
            return True
        good = tests.run([test], limit)["outcome"] == "passed"
        with self.lock:
            (self.sound if good else self.unsound).add(key)
        return good
