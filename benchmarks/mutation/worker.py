"""What runs inside pytest, in a process of its own: recording, and judging mutants in forked children.

The warm process brings up what is slow and knows nothing of the pack (the host, torch), then forks for each mutant.
The child imports the tests and with them the pack, whose mutant lies in the copy of the tree by then.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from .coverage_map import Recorder
from .tree import WARM

MEMORY = 2 * 2**30  # bytes that a child may take above what the warm process has


class Verdict:
    """A pytest plugin that notes the first failure, of a test or of the import of its file."""

    def __init__(self):
        self.by: str | None = None
        self.why = ""

    def pytest_collectreport(self, report):
        self._note(report)

    def pytest_runtest_logreport(self, report):
        self._note(report)

    def _note(self, report):
        if report.failed and self.by is None:
            self.by = report.nodeid
            text = str(report.longrepr or "").strip()
            print(text, flush=True)  # into the job's log
            self.why = text.splitlines()[-1][:300] if text else ""

    def answer(self, ran: int) -> dict:
        return {"outcome": "killed" if self.by else "passed", "by": self.by, "why": self.why, "ran": ran}


class Chooser(Verdict):
    """For systems without fork: runs the chosen tests of a usual pytest run, in order, up to the first failure."""

    def __init__(self, tests: list[str]):
        super().__init__()
        self.tests, self.ran = tests, 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        found = {item.nodeid: item for item in items}
        items[:] = [found[test] for test in self.tests if test in found]

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        self._note(report)


class Forker(Verdict):
    """A pytest plugin: after the warm-up it answers requests, one JSON line each, with one JSON line each."""

    def __init__(self, requests, answers, product: list[str]):
        super().__init__()
        self.requests, self.answers, self.product = requests, answers, product

    def say(self, **message) -> None:
        self.answers.write(json.dumps(message) + "\n")
        self.answers.flush()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.testsfailed or len(session.items) != 2:
            self.say(error=f"the warm-up cannot be collected: {self.by}: {self.why}")
            return True
        warm, after = session.items
        session.config.hook.pytest_runtest_protocol(item=warm, nextitem=after)
        if self.by:
            self.say(error=f"the warm-up fails: {self.why}")
            return True
        early = self._imported_too_early(Path(session.config.rootpath))
        if early:
            self.say(error=f"the warm-up imports the code to be changed: {', '.join(early)}")
            return True
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        base = Path(session.config.option.basetemp)
        kept = base.with_name(base.name + "_kept")
        _replace_folder(base, kept)
        gc.collect()
        gc.freeze()
        self.say(ready=True, threads=threading.active_count())
        for line in self.requests:
            answer = self._judge(session, after, json.loads(line))
            _replace_folder(kept, base)  # each mutant meets the folders as the warm-up left them
            self.say(**answer)
        return True

    def _imported_too_early(self, root: Path) -> list[str]:
        folders = tuple(os.path.realpath(root / folder) + os.sep for folder in self.product)
        files = {name: os.path.realpath(getattr(module, "__file__", None) or "")
                 for name, module in list(sys.modules.items())}
        return sorted(name for name, file in files.items() if file.startswith(folders))

    def _judge(self, session, after, request: dict) -> dict:
        reading, writing = os.pipe()
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                os.setsid()
                _limit_memory()
                answer = self._run(session, after, request["tests"])
                os.write(writing, json.dumps(answer).encode())
            finally:
                os._exit(0)
        os.close(writing)
        status = _wait(child, start + request["limit"])
        with os.fdopen(reading, "rb") as pipe:
            text = b"" if status is None else pipe.read()
        seconds = round(time.monotonic() - start, 2)
        if status is None:
            return {"outcome": "timeout", "by": None, "why": f"over {request['limit']:.0f} s", "seconds": seconds}
        if not text:
            return {"outcome": "killed", "by": "a crash of the process", "why": f"exit status {status}",
                    "seconds": seconds}  # fmt: skip
        return {**json.loads(text), "seconds": seconds}

    def _run(self, session, after, tests: list[str]) -> dict:
        """In the child: collects the files and runs the tests, up to the first failure.

        The files are collected below the folder that the warm-up lies in: the fixtures of its conftest.py belong to
        that very node of pytest's tree, and what they made is kept with it.
        """
        hook, found = session.config.hook, {}
        try:
            for file in dict.fromkeys(test.split("::")[0] for test in tests):
                found.update((item.nodeid, item) for item in self._collect(session, after.parent.parent, file))
            hook.pytest_collection_modifyitems(session=session, config=session.config, items=list(found.values()))
        except BaseException as error:  # noqa: B036  whatever ends the collection, a mutant did it
            self.by, self.why = self.by or "collecting the tests", repr(error)[:300]
        if self.by:
            return self.answer(0)
        items = [found[test] for test in tests if test in found]
        if not items:
            return {"outcome": "killed", "by": "collecting the tests", "why": "its tests are not there any more"}
        hook.pytest_runtest_protocol(item=after, nextitem=items[0])
        for number, item in enumerate(items):
            following = items[number + 1] if number + 1 < len(items) else None
            hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.by:
                break
        return self.answer(number + 1)

    def _collect(self, session, folder, file: str):
        """The tests of one file, `folder` being the node of the folder of tests that the file is somewhere in."""
        path = Path(session.config.rootpath) / file
        for part in path.relative_to(folder.path).parts[:-1]:
            folder = folder.ihook.pytest_collect_directory(path=folder.path / part, parent=folder)
        for module in folder.ihook.pytest_collect_file(file_path=path, parent=folder):
            yield from session.genitems(module)


def _replace_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)


def _limit_memory() -> None:
    """Of what is written to. The address space would be too much: each thread reserves far more than it uses."""
    import resource

    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, resource.RLIM_INFINITY))


def _wait(child: int, until: float) -> int | None:
    """The child's exit status, or None after ending it and what it started because the time is over."""
    pause = 0.005
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end_group(child)  # what it started and left
            return status
        if time.monotonic() > until:
            _end_group(child)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _hypothesis() -> list[str]:
    return ["--hypothesis-seed=0"] if importlib.util.find_spec("hypothesis") else []


def _options(basetemp: str) -> list[str]:
    return ["-p", "no:cacheprovider", "-s", "-q", f"--basetemp={basetemp}", *_hypothesis()]


def main(arguments: list[str]) -> int:
    """Entry of the process: arguments[0] is one JSON object; see judge.py, which writes it."""
    task = json.loads(arguments[0])
    for name in task.get("imports", ()):
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # a test that needs it will say so
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    paths, options = task["paths"], _options(task["basetemp"])
    if task["do"] == "record":
        recorder = Recorder(Path.cwd(), task["product"])
        wrapped = _hooks_of(recorder)
        left_out = [f"--ignore-glob=*{name}" for name in (WARM, *task["without"])]
        status = pytest.main([*options, *paths, *left_out], plugins=[recorder, wrapped])
        Path(task["result"]).write_text(json.dumps(recorder.result()), "utf-8")
        return int(status)
    if task["do"] == "once":
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        chooser = Chooser(task["tests"])
        pytest.main([*options, "-x", *paths], plugins=[chooser])
        Path(task["result"]).write_text(json.dumps(chooser.answer(chooser.ran)), "utf-8")
        return 0
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0), "r")
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    pytest.main([*options, *paths], plugins=[Forker(requests, answers, task["product"])])
    return 0


def _hooks_of(recorder: Recorder):
    """The recorder's two wrapping hooks; coverage_map.py itself can be imported without pytest."""

    class Wrapped:
        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_protocol(self, item):
            return (yield from recorder.wrap_runtest_protocol(item))

        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef):
            return (yield from recorder.wrap_fixture_setup(fixturedef))

    return Wrapped()
