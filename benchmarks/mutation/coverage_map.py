"""Which tests run a line, and how long each test takes: recorded in one run of a tier, kept as JSON."""

from __future__ import annotations

import ast
import builtins
import functools
import gc
import json
import os
import time
from collections import defaultdict
from importlib.machinery import SourceFileLoader
from pathlib import Path

IMPORT = "import"  # what runs outside of every test and fixture
MARK = "__styleloom_ran__"


class Recorder:
    """A pytest plugin that notes every statement of the rooms under the test that runs it.

    While a module of the rooms is imported, a mark is put before each of its statements. Code of others, which takes
    nearly all of the time of these tests, runs as fast as ever; under a trace function all of it would be slow.

    Lines run while a shared fixture is set up belong to every test that uses the fixture. The caches of functions
    (`functools.lru_cache`) are emptied before each test, or only the first test would run their lines.
    """

    def __init__(self, root: Path, folders: list[str]):
        self.root = os.path.realpath(root) + os.sep
        self.folders = tuple(folder + "/" for folder in folders)
        self.lines: dict[str, set[int]] = defaultdict(set)
        self.here, self.test = self.lines[IMPORT], None
        self.places: list[tuple[str, int]] = []  # mark -> (file, line)
        self.code_files: set[str] = set()
        self.tests: dict[str, dict] = {}
        self.fixture_seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.shared = 0.0
        self.get_code = SourceFileLoader.get_code
        self._install()

    def _install(self) -> None:
        recorder = self

        def get_code(loader, name):
            path = loader.get_filename(name)
            file = recorder._file_of(path)
            if file is None:
                return recorder.get_code(loader, name)
            recorder.code_files.add(path)
            tree = recorder.marked(ast.parse(loader.get_data(path), path), file)
            return compile(tree, path, "exec", dont_inherit=True)

        SourceFileLoader.get_code = get_code
        setattr(builtins, MARK, self.ran)

    def _file_of(self, path: str) -> str | None:
        """The name below the root of a file of the rooms; None for all others."""
        path = os.path.realpath(path)
        if not path.startswith(self.root):
            return None
        name = path[len(self.root) :].replace(os.sep, "/")
        return name if name.startswith(self.folders) else None

    def ran(self, mark: int) -> None:
        self.here.add(mark)

    def marked(self, tree: ast.Module, file: str) -> ast.Module:
        """The same code with a mark before each statement; lines keep their numbers."""
        for node in list(ast.walk(tree)):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if not isinstance(block, list) or not block:
                    continue  # of a lambda or a conditional expression
                found = []
                for number, statement in enumerate(block):
                    text = number == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                    future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
                    if not text and not future:
                        found.append(self._mark(statement, file))
                    found.append(statement)
                setattr(node, field, found)
        return ast.fix_missing_locations(tree)

    def _mark(self, statement: ast.stmt, file: str) -> ast.stmt:
        self.places.append((file, statement.lineno))
        call = ast.Call(ast.Name(MARK, ast.Load()), [ast.Constant(len(self.places) - 1)], [])
        return ast.copy_location(ast.Expr(call), statement)

    def _empty_caches(self) -> None:
        for found in gc.get_objects():
            if type(found) is functools._lru_cache_wrapper:
                code = getattr(getattr(found, "__wrapped__", None), "__code__", None)
                if code is not None and code.co_filename in self.code_files:
                    found.cache_clear()

    def wrap_runtest_protocol(self, item):
        self._empty_caches()
        names = item._fixtureinfo.name2fixturedefs
        keys = {fixture_key(names[name][-1]) for name in item.fixturenames if name in names}
        self.test = self.tests.setdefault(item.nodeid, {"fixtures": keys})
        self.here, self.shared = self.lines[item.nodeid], 0.0
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
        SourceFileLoader.get_code = self.get_code
        passed = [test for test in self.tests if test not in self.failed]
        users = defaultdict(list)
        for number, test in enumerate(passed):
            users[test].append(number)
            for key in self.tests[test]["fixtures"]:
                users[key].append(number)
        lines: dict[str, dict[int, set]] = defaultdict(lambda: defaultdict(set))
        for context, found in self.lines.items():
            for file, line in (self.places[mark] for mark in found):
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
