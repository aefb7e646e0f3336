"""run.py test: files shared by two pytests, what is shown of them, and what is not lost when one of them dies."""

from __future__ import annotations

import json
import os
import sys

import pytest
from run_module import load_runner

environment, parts = map(load_runner, ("environment", "parts"))

RUNS = "import os\ndef test_{name}():\n    open('ran', 'a').write(f'{name} {{os.getpid()}}\\n')\n    {body}\n"
SHARES = [{"first": [], "never": ["live"], "backwards": False}, {"first": ["live"], "never": [], "backwards": True}]


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """(files by name: their test's body, arguments) → (exit status, tests that ran and by which process)."""
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = dict(os.environ, PYTHONUTF8="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

    def run(bodies, *arguments):
        for name, body in bodies.items():
            file = tmp_path / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(RUNS.format(name=name.replace("/", "_"), body=body), encoding="utf-8")
        two = [parts.Part(f"part {i}", [".", *arguments], share) for i, share in enumerate(SHARES)]
        (tmp_path / "ran").write_text("")
        status = parts.run(environment.Environment(sys.executable), env, two)
        return status, [line.split() for line in (tmp_path / "ran").read_text().splitlines()]

    return run


WAITS = """import time; end = time.monotonic() + 60
    while not all(name in open('ran').read() for name in ("live_test_d", "test_c")):
        assert time.monotonic() < end; time.sleep(0.02)"""


# One of the two processes begins when the other has run what failed before, and has most likely ended.
BEGINS_LATE = """import os, time
try:
    os.close(os.open("one", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    end = time.monotonic() + 60
    while "test_b" not in open("ran").read() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.7)
"""


def test_each_file_runs_once_and_neither_process_waits_for_the_other(suite, tmp_path, capfd):
    """The live file is the second's; the second then goes on with the last one, while the first is busy."""
    bodies = {"test_a": WAITS, "test_b": "assert 0, 'gr\u00fcn'", "test_c": "pass", "live/test_d": "pass"}
    status, ran = suite(bodies)
    out = capfd.readouterr().out
    assert status == 1 and out.splitlines()[-1] == "3 passed, 1 failed"
    assert sorted(name for name, _ in ran) == ["live_test_d", "test_a", "test_b", "test_c"]
    assert dict(ran)["test_c"] == dict(ran)["live_test_d"]
    # A line for each file and each failure comes first, and the output of both after it.
    shown, both = out.split("=== part 0 ===")
    assert "FAILED test_b.py::test_test_b: AssertionError: gr\u00fcn" in shown and "[100%]" in shown and "test_a.py: 1 passed" in shown
    assert "=== part 1 ===" in both and "gr\u00fcn" in both
    failed = json.loads((tmp_path / parts.LAST_FAILED).read_text())
    assert failed == {"test_b.py::test_test_b": True}

    (tmp_path / "conftest.py").write_text(BEGINS_LATE)
    status, ran = suite({"test_b": "pass"}, "--lf")
    assert status == 0 and [name for name, _ in ran] == ["test_b"] and json.loads((tmp_path / parts.LAST_FAILED).read_text()) == {}


def test_what_a_dead_process_leaves_is_a_failure(suite, capfd):
    status, _ = suite({"test_a": "pass", "live/test_d": "__import__('os')._exit(3)", "live/test_e": "pass"})
    out = capfd.readouterr().out
    assert status == 3 and out.splitlines()[-1] == "1 passed, 2 failed"
    assert "Not run to the end: the files live/test_d.py, live/test_e.py" in out


def test_a_file_that_cannot_be_read_is_a_failure(suite, capfd):
    assert suite({"test_a": "pass", "test_b": ")"})[0] == 2
    assert " 0 failed" not in capfd.readouterr().out


def test_nothing_selected(suite, capfd):
    assert suite({"test_a": "pass"}, "-k", "nothing_of_that_name") == (parts.NOTHING_FOUND, [])
    assert capfd.readouterr().out.splitlines()[-1] == "0 passed, 2 failed"


def test_progress(tmp_path, capsys):
    """Shares of all tests; a line that is not whole yet waits; what runs is named when nothing else is to tell."""
    now, files = [0.0], [tmp_path / "0.lines", tmp_path / "1.lines"]
    progress = parts.Progress(files, lambda: now[0])
    progress()
    files[0].write_text('{"tests": 4}\n{"begins": "a"}\n{"ends": "a", "counts": {"passed": 2, "failed": 1}, "seco')
    files[1].write_text('{"tests": 4}\n{"begins": "b"}\n')
    progress()
    assert capsys.readouterr().out == ""
    with files[0].open("a") as file:
        file.write('nds": 2.6}\n{"begins": "c"}\n')
    progress()
    assert capsys.readouterr().out == "[ 75%] a: 2 passed, 1 failed in 3 s\n"
    now[0] = parts.QUIET_SECONDS + 1
    progress()
    progress()
    assert capsys.readouterr().out == "[ 75%] still running: b, c\n"
