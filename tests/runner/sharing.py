"""One run of the tests in several pytest processes: each runs the files that it is the first to take.

Every process collects all tests, so all of them know the same list of files. A file is taken by making a file of its
name in a folder that they share, which the system lets only one of them do. One goes through the list from its
beginning, the other from its end, until they meet: neither waits for the other, however long a file takes.
A file is never divided: what its tests share, they share in one process.

This module runs inside pytest; the other side is parts.py.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from urllib.parse import quote

import pytest


class Report:
    """pytest plugin: what came of the tests, as lines of JSON while they run and in one file at the end.

    `<place>.lines`: {"tests": how many were collected}, {"begins": file}, {"failed": test, "why": words},
    {"ends": file, "counts": {outcome: number}, "seconds": s}. `<place>.json`: see `pytest_terminal_summary`.
    """

    def __init__(self, place: str):
        self.lines, self.summary = Path(f"{place}.lines"), Path(f"{place}.json")
        self.ran: list[str] = []
        self.files: list[str] = []
        self._counts: dict[str, int] = {}
        self._began = 0.0

    def say(self, **line) -> None:
        with open(self.lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def begins(self, name: str) -> None:
        self._counts, self._began = {}, time.monotonic()
        self.say(begins=name)

    def ends(self, name: str) -> None:
        self.ran.append(name)
        self.say(ends=name, counts=self._counts, seconds=round(time.monotonic() - self._began, 1))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            words = str(report.longrepr).strip().splitlines() or [""]
            self.say(failed=report.nodeid, why=next((line[1:].strip() for line in words if line.startswith("E")), words[-1]))
        if report.when == "call" or not report.passed:
            outcome = "failed" if report.failed else report.outcome
            self._counts[outcome] = self._counts.get(outcome, 0) + 1

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Writes the number of tests by outcome; `files` and those that `ran`; which tests were `good` and `bad`."""
        stats = terminalreporter.stats
        tests = {outcome: [report.nodeid for report in stats.get(outcome, ()) if getattr(report, "nodeid", "")]
                 for outcome in ("passed", "failed", "error")}
        found = {"counts": {outcome: len(reports) for outcome, reports in stats.items() if outcome},
                 "files": self.files, "ran": self.ran,
                 "good": tests["passed"], "bad": sorted({*tests["failed"], *tests["error"]})}
        self.summary.write_text(json.dumps(found), encoding="utf-8")


class Share:
    """pytest plugin: runs only the files that this process takes before another does.

    taken: the folder that the processes share. first: folders whose files this process takes before any others;
    never: those whose files it leaves to others. backwards: it takes all others from the last to the first.
    """

    def __init__(self, report: Report, taken: str, first: list[str], never: list[str], backwards: bool):
        self.report, self.taken = report, Path(taken)
        self.first, self.never, self.backwards = first, never, backwards

    def order(self, files: list[str]) -> list[str]:
        """The files in the order in which this process tries to take them."""
        def below(name: str, folders: list[str]) -> bool:
            return any(name.startswith(f"{folder}/") for folder in folders)

        mine = [name for name in files if below(name, self.first)]
        others = [name for name in files if not below(name, [*self.first, *self.never])]
        return mine + (others[::-1] if self.backwards else others)

    def take(self, name: str) -> bool:
        try:
            os.close(os.open(self.taken / quote(name, safe=""), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """pytest's own loop, file by file. The next file is taken before the last test of one: what is torn down after
        a test depends on which one is next."""
        if session.config.option.collectonly or session.testsfailed:
            return None  # pytest's own loop says what is wrong
        files: dict[str, list[pytest.Item]] = {}
        for item in session.items:
            files.setdefault(item.nodeid.split("::")[0], []).append(item)
        self.report.files = list(files)
        self.report.say(tests=len(session.items))
        rest = iter(self.order(list(files)))
        name = next(filter(self.take, rest), None)
        while name is not None:
            self.report.begins(name)
            items = files[name]
            for item, following in zip(items, items[1:]):
                run(session, item, following)
            next_name = next(filter(self.take, rest), None)
            run(session, items[-1], files[next_name][0] if next_name else None)
            self.report.ends(name)
            name = next_name
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """What failed last is written once, for all processes (see parts.py): a process that ends before another has
        begun would otherwise take from it what --lf is to run. By this name pytest knows that it is one of several."""
        session.config.workerinput = {}


def run(session: pytest.Session, item: pytest.Item, following: pytest.Item | None) -> None:
    """One test, as pytest's own loop runs it."""
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def main(arguments: list[str]) -> int:
    """pytest on all arguments but the first, which says in JSON where to report and what to share (see parts.py)."""
    settings = json.loads(arguments[0])
    report = Report(settings["report"])
    plugins = [report, *([Share(report, **settings["share"])] if settings["share"] else [])]
    return int(pytest.main(arguments[1:], plugins=plugins))
