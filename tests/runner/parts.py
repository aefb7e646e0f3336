"""The tests in two processes that share the work, and one honest line at the end.

The tests with a live server (tests/browser and tests/server) mostly wait for that server and the browser; the others
keep one processor busy. So there are two pytests. One begins with the live tests and then helps with the others, from
the last file on; see sharing.py, which is the side of this inside pytest.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .common import ROOT, await_all, read_stamp, say, write_whole
from .environment import Environment

LIVE = ("tests/browser", "tests/server")
# Options that mean the same when two processes have them. With any other (-x, --pdb, --junitxml, …) there is one.
DIVISIBLE = re.compile(r"-q+|-v+|-r\w+|--tb=\w+|--durations=\d+|--color=\w+|--lf|--last-failed")
WITH_VALUE = ("-k", "-m")
NOTHING_FOUND = 5  # pytest's exit status when no test was selected
QUIET_SECONDS = 60  # without news for so long, what is running is named
# Where pytest keeps what failed last, for --lf.
LAST_FAILED = ".pytest_cache/v/cache/lastfailed"
# tests/ and not the root is put on the path: the root holds a folder `nodes`. And it does not stay there.
PYTEST = f"""
tests = {str(Path(__file__).resolve().parents[1])!r}
sys.path.insert(0, tests)
from runner import sharing
sys.path.remove(tests)
sys.exit(sharing.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Part:
    """One pytest: what it is called on the screen, and its arguments.

    share: which files it takes first, which never, and from which end it takes the others (see sharing.Share); None
    when it runs all that it collects.
    """

    name: str
    arguments: list[str]
    share: dict | None = None


def parts_of(arguments: list[str]) -> list[Part]:
    """Two parts when every folder is asked for; else, when paths are named, one. `arguments` are for pytest."""
    paths, others, divisible = _sorted(arguments)
    if any(path.rstrip("/") != "tests" for path in paths):
        return [Part("tests", arguments)]
    if not divisible:
        return [Part("tests", ["tests", *others])]
    return [Part("first process", ["tests", *others], {"first": [], "never": [*LIVE], "backwards": False}),
            Part("second process", ["tests", *others], {"first": [*LIVE], "never": [], "backwards": True})]


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

    One part's output is shown as it comes. Of several, a line for each file and each failure is shown as they come,
    and pytest's own output of each at the end.
    """
    failed_before = read_stamp(ROOT / LAST_FAILED)
    processes, outputs = [], []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        taken = folder / "taken"
        taken.mkdir()
        places = [folder / str(i) for i in range(len(parts))]
        shared = len(parts) > 1
        if shared:
            say(f"{len(parts)} processes share the tests: a line for each file as it ends, all of the output at the end.")
        for place, part in zip(places, parts):
            outputs.append(stack.enter_context(tempfile.TemporaryFile()) if shared else None)
            share = {"taken": str(taken), **part.share} if part.share else None
            settings = json.dumps({"report": str(place), "share": share})
            command = environment.command(PYTEST, settings, *part.arguments)
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=outputs[-1],
                                              stderr=subprocess.STDOUT if shared else None))
        progress = Progress([place.with_suffix(".lines") for place in places]) if shared else None
        await_all(processes, progress)
        if progress:
            progress()
        for part, output in zip(parts, outputs if shared else ()):
            say(f"\n=== {part.name} ===")
            output.seek(0)
            sys.stdout.write(output.read().decode("utf-8", errors="replace"))
        summaries = [read_stamp(place.with_suffix(".json")) for place in places]
    ends = [(part.name, process.returncode, summary.get("counts", {}))
            for part, process, summary in zip(parts, processes, summaries)]
    if shared:
        _remember_failures(failed_before, summaries)
        ends += _left_over(summaries)
    return sum_up(ends)


class Progress:
    """Shows what the processes write while they run (sharing.Report.lines). Call it every now and then."""

    def __init__(self, files: list[Path], clock=time.monotonic):
        self.files, self.clock = files, clock
        self.read = dict.fromkeys(files, 0)
        self.running: dict[Path, str] = {}
        self.total = self.done = 0
        self.last_news = clock()

    def __call__(self) -> None:
        for file in self.files:
            for line in self._new_lines(file):
                self._show(file, json.loads(line))
        if self.running and self.clock() - self.last_news > QUIET_SECONDS:
            self._say("still running: " + ", ".join(sorted(self.running.values())))

    def _new_lines(self, file: Path) -> list[bytes]:
        """The whole lines since the last time: one that is being written is left for the next."""
        if not file.exists():
            return []
        with open(file, "rb") as stream:
            stream.seek(self.read[file])
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read[file] += len(whole)
        return whole.splitlines()

    def _show(self, file: Path, line: dict) -> None:
        if "tests" in line:
            self.total = max(self.total, line["tests"])
        elif "begins" in line:
            self.running[file] = line["begins"]
        elif "failed" in line:
            self._say(f"FAILED {line['failed']}: {line['why']}")
        elif "ends" in line:
            self.running.pop(file, None)
            self.done += sum(line["counts"].values())
            counts = ", ".join(f"{count} {outcome}" for outcome, count in line["counts"].items())
            self._say(f"{line['ends']}: {counts} in {line['seconds']:.0f} s")

    def _say(self, text: str) -> None:
        self.last_news = self.clock()
        share = min(self.done / self.total, 1) if self.total else 0
        say(f"[{share:4.0%}] {text}")


def _remember_failures(before: dict, summaries: list[dict]) -> None:
    """Writes what --lf reads; the processes leave it to this."""
    good = {test for summary in summaries for test in summary.get("good", ())}
    bad = {test for summary in summaries for test in summary.get("bad", ())}
    failed = {test: True for test in sorted({*before, *bad} - (good - bad))}
    if failed or before:
        write_whole(ROOT / LAST_FAILED, failed)


def _left_over(summaries: list[dict]) -> list[tuple[str, int, dict]]:
    """An end for the files that were collected and that no process ran to its end: none where all went well."""
    files = {name for summary in summaries for name in summary.get("files", ())}
    left = sorted(files - {name for summary in summaries for name in summary.get("ran", ())})
    return [(f"{'file' if len(left) == 1 else 'files'} {', '.join(left)}", 1, {})] if left else []


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
            say(f"\nNot run to the end: the {name}; pytest's exit status is {status}.")
        passed, skipped = passed + count.get("passed", 0), skipped + count.get("skipped", 0)
        failed += max(wrong, 1) if status in bad else wrong
    say(f"\nskipped: {skipped}\n{passed} passed, {failed} failed")
    return abs(bad[0]) if bad else 0
