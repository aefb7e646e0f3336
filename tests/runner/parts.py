"""The tests in two processes side by side, and one honest line at the end.

The tests with a live server (tests/browser and tests/server) mostly wait for that server and the browser; the others
keep one processor busy. So each part has a pytest of its own.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .common import ROOT, await_all, read_stamp, say
from .environment import Environment

LIVE = ("tests/browser", "tests/server")
# Options that mean the same when two processes have them. With any other (-x, --pdb, --junitxml, …) there is one.
DIVISIBLE = re.compile(r"-q+|-v+|-r\w+|--tb=\w+|--durations=\d+|--color=\w+|--lf|--last-failed")
WITH_VALUE = ("-k", "-m")
NOTHING_FOUND = 5  # pytest's exit status when no test was selected
# Not `python -m pytest`: see Environment.path_setup. The first argument is where the counts go, the rest is pytest's.
PYTEST = """
import json, pytest

class Counts:
    def pytest_terminal_summary(self, terminalreporter):
        counts = {kind: len(reports) for kind, reports in terminalreporter.stats.items() if kind}
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(counts, file)

raise SystemExit(pytest.main(sys.argv[2:], plugins=[Counts()]))
"""


@dataclass(frozen=True)
class Part:
    """One pytest: what it is called on the screen, and its arguments."""

    name: str
    arguments: list[str]


def parts_of(arguments: list[str]) -> list[Part]:
    """Two parts when every folder is asked for; else, when paths are named, one. `arguments` are for pytest."""
    paths, others, divisible = _sorted(arguments)
    if any(path.rstrip("/") != "tests" for path in paths):
        return [Part("tests", arguments)]
    if not divisible:
        return [Part("tests", ["tests", *others])]
    # Each remembers its failures (--lf) in a folder of its own; the second to end would overwrite the first's.
    rest = ["tests", *(f"--ignore={path}" for path in LIVE), "-o", "cache_dir=.pytest_cache/rest"]
    return [Part("unit and host tests", [*rest, *others]),
            Part("browser and server tests", [*LIVE, "-o", "cache_dir=.pytest_cache/live", *others])]


def _sorted(arguments: list[str]) -> tuple[list[str], list[str], bool]:
    """(the paths, everything else, whether everything else means the same to two processes)."""
    paths, others, divisible, rest = [], [], True, iter(arguments)
    for argument in rest:
        if argument in WITH_VALUE:
            others += [argument, next(rest, "")]
        elif not argument.startswith("-") and (ROOT / argument.split("::")[0]).exists():
            paths.append(argument)
        else:
            others.append(argument)
            divisible = divisible and DIVISIBLE.fullmatch(argument) is not None
    return paths, others, divisible


def run(environment: Environment, env: dict[str, str], parts: list[Part]) -> int:
    """Runs the parts side by side; returns 0 only if all of them passed. The last line is the sum (see sum_up).

    The first one's output is shown as it comes, another's when all have ended.
    """
    processes, outputs, counts = [], [], []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if len(parts) > 1:
            say(f"Two processes: the {parts[0].name} are shown as they run, the {parts[1].name} at the end.")
        for i, part in enumerate(parts):
            counts.append(folder / f"{i}.json")
            outputs.append(stack.enter_context(tempfile.TemporaryFile()) if i else None)
            command = environment.command(PYTEST, str(counts[i]), *part.arguments)
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=outputs[i],
                                              stderr=subprocess.STDOUT if i else None))
        await_all(processes, f"\nThe {parts[-1].name} are still running …")
        for part, output in zip(parts[1:], outputs[1:]):
            say(f"\n=== {part.name} ===")
            output.seek(0)
            sys.stdout.write(output.read().decode("utf-8", errors="replace"))
        ends = [(part.name, process.returncode, read_stamp(count))
                for part, process, count in zip(parts, processes, counts)]
    return sum_up(ends)


def sum_up(ends: list[tuple[str, int, dict]]) -> int:
    """Says the sum of the parts, given as (name, exit status, tests by outcome); returns the exit status of all.

    The last line is `N passed, N failed`. An error around a test counts as failed, and so does a part that ended
    badly without a failed test (stopped, crashed, nothing collected): 0 failed is said only where all went well.
    """
    passed = failed = skipped = 0
    bad = [status for _, status, _ in ends if status not in (0, NOTHING_FOUND)]
    if not bad and all(status == NOTHING_FOUND for _, status, _ in ends):
        bad = [NOTHING_FOUND]
    for name, status, count in ends:
        wrong = count.get("failed", 0) + count.get("error", 0)
        if status in bad and not wrong:
            say(f"\nThe {name} did not run to their end: pytest's exit status is {status}.")
        passed, skipped = passed + count.get("passed", 0), skipped + count.get("skipped", 0)
        failed += max(wrong, 1) if status in bad else wrong
    say(f"\nskipped: {skipped}\n{passed} passed, {failed} failed")
    return abs(bad[0]) if bad else 0
