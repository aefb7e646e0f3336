"""Which tests run a line, and how long each test takes: recorded in one run of a tier, kept as JSON."""

from __future__ import annotations

import ast
import functools
import gc
import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

IMPORT = "import"  # what runs outside of every test and fixture


class Recorder:
    """A pytest plugin: a trace function that notes every line of the rooms under the test that runs it.

    Lines run while a shared fixture is set up belong to every test that uses the fixture. The caches of functions
    (`functools.lru_cache`) are emptied before each test, or only the first test would run their lines.
    """

    def __init__(self, root: Path, folders: list[str]):
        self.root = os.path.realpath(root) + os.sep
        self.folders = tuple(folder + "/" for folder in folders)
        self.lines: dict[str, set] = defaultdict(set)
        self.here, self.test = self.lines[IMPORT], None
        self.tracers: dict[str, object] = {}
        self.tests: dict[str, dict] = {}
        self.fixture_seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.shared = 0.0

    def _tracer(self, file: str):
        """The trace function for the lines of one code file; None where it is no file of the rooms."""
        path = os.path.realpath(file)
        if not path.startswith(self.root):
            return None
        name = path[len(self.root) :].replace(os.sep, "/")
        if not name.startswith(self.folders):
            return None

        def line(frame, event, _):
            if event == "line":
                self.here.add((name, frame.f_lineno))
            return line

        return line

    def trace(self, frame, event, _):
        file = frame.f_code.co_filename
        if file not in self.tracers:
            self.tracers[file] = self._tracer(file)
        return self.tracers[file]

    def arm(self) -> None:
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def pytest_collection(self):
        self.arm()

    def _empty_caches(self) -> None:
        for found in gc.get_objects():
            if type(found) is functools._lru_cache_wrapper:
                code = getattr(getattr(found, "__wrapped__", None), "__code__", None)
                if code is not None and self.tracers.get(code.co_filename) is not None:
                    found.cache_clear()

    def wrap_runtest_protocol(self, item):
        self._empty_caches()
        names = item._fixtureinfo.name2fixturedefs
        keys = {fixture_key(names[name][-1]) for name in item.fixturenames if name in names}
        self.test = self.tests.setdefault(item.nodeid, {"fixtures": keys})
        self.here, self.shared = self.lines[item.nodeid], 0.0
        self.arm()
        start = time.perf_counter()
        result = yield
        self.test["seconds"] = round(time.perf_counter() - start - self.shared, 4)
        self.here, self.test = self.lines[IMPORT], None
        return result

    def wrap_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        key, before, nested = fixture_key(fixturedef), self.here, self.shared
        if self.test is not None:
            self.test["fixtures"].add(key)
        self.here = self.lines[key]
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            spent = time.perf_counter() - start
            self.fixture_seconds[key] = max(self.fixture_seconds[key], round(spent - (self.shared - nested), 4))
            self.shared = nested + spent
            self.here = before

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def result(self) -> dict:
        """What `Map` reads. A line of a fixture counts for the tests that use it."""
        sys.settrace(None)
        threading.settrace(None)
        passed = [test for test in self.tests if test not in self.failed]
        users = defaultdict(list)
        for number, test in enumerate(passed):
            users[test].append(number)
            for key in self.tests[test]["fixtures"]:
                users[key].append(number)
        lines: dict[str, dict[int, set]] = defaultdict(lambda: defaultdict(set))
        for context, found in self.lines.items():
            for file, line in found:
                lines[file][line].update(users[context])
        tests = [{"id": test, "seconds": self.tests[test]["seconds"],
                  "fixtures": sorted(self.tests[test]["fixtures"] & set(self.fixture_seconds))} for test in passed]
        return {
            "tests": tests, "fixtures": dict(self.fixture_seconds), "left_out": sorted(self.failed),
            "lines": {file: {line: sorted(numbers) for line, numbers in at.items()} for file, at in lines.items()},
        }  # fmt: skip


def fixture_key(fixturedef) -> str:
    """One name for a fixture: where it is defined, and its own name."""
    return f"{fixturedef.baseid}::{fixturedef.argname}"


class Map:
    """The record of one tier, read back."""

    def __init__(self, record: dict, root: Path):
        self.root, self.tests = root, record["tests"]
        self.fixtures, self.left_out = record["fixtures"], record["left_out"]
        self.lines = {file: {int(line): set(found) for line, found in at.items()}
                      for file, at in record["lines"].items()}

    @classmethod
    def load(cls, path: Path, root: Path) -> Map:
        return cls(json.loads(path.read_text("utf-8")), root)

    def runs(self, file: str, span: tuple[int, int]) -> set[int]:
        """Numbers of the tests that run a line of the span."""
        at = self.lines.get(file, {})
        return set().union(*(at.get(line, ()) for line in range(span[0], span[1] + 1)))

    def reached(self, file: str, span: tuple[int, int]) -> bool:
        """Whether anything ran there, if only while a module was imported."""
        return any(line in self.lines.get(file, {}) for line in range(span[0], span[1] + 1))

    def runs_functions_of(self, file: str) -> set[int]:
        """Numbers of the tests that run a line inside a function of the file."""
        inside = _function_lines(self.root / file)
        return set().union(*(found for line, found in self.lines.get(file, {}).items() if line in inside))

    def tests_for(self, file: str, span: tuple[int, int], at_import: bool) -> list[int]:
        """The tests that a change there may fail, cheapest first.

        What runs while the module is imported (a constant, a table, a default) acts where it is used: the tests
        that run the functions of the file, or of a file that imports it, or whose own file imports it.
        """
        found = self.runs(file, span)
        if not self.reached(file, span):
            return []
        if at_import or not found:
            found = found | self.runs_functions_of(file)
            for user in self.lines:
                if user != file and imports(self.root / user, file):
                    found |= self.runs_functions_of(user)
            files = {test["id"].split("::")[0] for test in self.tests}
            direct = {name for name in files if imports(self.root / name, file)}
            found |= {number for number, test in enumerate(self.tests) if test["id"].split("::")[0] in direct}
        return sorted(found, key=lambda number: (self.seconds([number]), number))

    def seconds(self, numbers: list[int]) -> float:
        """How long these tests took together, each shared fixture counted once."""
        keys = {key for number in numbers for key in self.tests[number]["fixtures"]}
        return sum(self.tests[number]["seconds"] for number in numbers) + sum(self.fixtures[key] for key in keys)

    def batches(self, numbers: list[int], steps: tuple[float, ...] = (3.0, 20.0)) -> list[list[int]]:
        """Cut into runs of their own: most mutants fall in the first, and its few test files are quick to import."""
        parts, rest = [], list(numbers)
        for step in steps:
            part, spent = [], 0.0
            while rest and (not part or spent + self.tests[rest[0]]["seconds"] <= step):
                spent += self.tests[rest[0]]["seconds"]
                part.append(rest.pop(0))
            parts.append(part)
        return [part for part in [*parts, rest] if part]


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


@functools.cache
def _function_lines(path: Path) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.update(range(node.body[0].lineno, node.end_lineno + 1))
    return found


@functools.cache
def imports(path: Path, file: str) -> bool:
    """Whether the code at `path` imports the module `file`; by the end of its name, so rather too often."""
    parts = file.removesuffix(".py").removesuffix("/__init__").split("/")
    module, name = parts[-2] if len(parts) > 1 else "", parts[-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom):
            said = (node.module or "").split(".")
            if said[-1] == name and (len(said) < 2 or said[-2] == module):
                return True
            if said[-1] in (module, "") and any(alias.name == name for alias in node.names):
                return True
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[-1] == name for alias in node.names):
            return True
    return False
