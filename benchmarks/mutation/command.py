"""The command behind `benchmarks/mutate.py`: draw, record, judge, sum up."""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from .coverage_map import Map
from .judge import CannotJudge, Judge, Tests, Workplace, can_fork, record
from .mutants import Mutant, draw, mutants_of
from .tree import ROOMS, Room, tree_hash

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = ROOT / "benchmarks" / "mutants_that_change_nothing.txt"
KEYS = ("file", "line", "change", "why")


def read_equivalent(path: Path) -> dict[tuple[str, str, str], str]:
    """(file, the line's text, old -> new) → why it changes nothing."""
    found, block, number = {}, {}, 0
    for number, line in enumerate([*path.read_text("utf-8").splitlines(), ""], 1):
        if line.startswith("#"):
            continue
        if line.strip():
            key, _, value = line.partition(":")
            if key not in KEYS or not value.strip():
                sys.exit(f"{path}, line {number}: expected `{':`, `'.join(KEYS)}:` with a value, found {line!r}.")
            block[key] = value.strip()
        elif block:
            if len(block) < len(KEYS):
                sys.exit(f"{path}, before line {number}: the entry lacks {', '.join(set(KEYS) - set(block))}.")
            found[block["file"], block["line"], block["change"]] = block["why"]
            block = {}
    return found


def as_entry(mutant: Mutant, why: str) -> str:
    return f"file: {mutant.file}\nline: {mutant.source}\nchange: {mutant.change}\nwhy: {why}\n"


def sample(root: Path, rooms: dict[str, Room], only: list[str], count: int, seed: int) -> list[Mutant]:
    """The drawn mutants; each is proved to be Python and another text than the original."""
    found = []
    for room in rooms.values():
        for folder in room.sources:
            for path in sorted((root / folder).rglob("*.py")):
                file = path.relative_to(root).as_posix()
                if not only or any(file == name or file.startswith(name + "/") for name in only):
                    found += mutants_of(file, path.read_bytes())
    return draw(found, count, seed, lambda mutant: _compiles(mutant, (root / mutant.file).read_bytes()))


def _compiles(mutant: Mutant, source: bytes) -> bool:
    changed = mutant.applied(source)
    try:
        compile(changed, mutant.file, "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return changed != source


def maps_of(root: Path, rooms: dict[str, Room], place: Workplace, work: Path, trees: dict[str, str],
            chosen: list[str]) -> dict[str, Map]:
    """The map of each tier, recorded now if the tree has changed. `chosen`: test paths to record instead of all."""
    maps = {}
    for name, room in rooms.items():
        paths = [path for path in chosen if path.startswith(room.tests)] if chosen else [room.tests]
        if not paths:
            continue
        target = work / f"map_{name}_{trees[name]}{'_part' if chosen else ''}.json"
        wanted = work / f"map_{name}_paths.json"
        if not target.is_file() or chosen and (not wanted.is_file() or json.loads(wanted.read_text()) != paths):
            print(f"Recording which lines {' '.join(paths)} run …", flush=True)
            start = time.monotonic()
            record(place, room, paths, target)
            wanted.write_text(json.dumps(paths))
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
        maps[name] = Map.load(target, root)
        left_out = maps[name].left_out
        print(f"{room.tests}: {len(maps[name].tests)} tests"
              + (f"; left out because they fail or are skipped as the code is: {', '.join(left_out)}"
                 if left_out else ""), flush=True)
    return maps


def line_of(mutant: Mutant, verdict: dict) -> str:
    by = f" by {verdict['by']}" if verdict.get("by") else ""
    more = "; ".join(text for text in (verdict.get("note"), "" if by else verdict.get("why")) if text)
    more = f" ({more})" if more else ""
    change = " -> ".join(side if len(side) < 90 else side[:87] + "..." for side in (mutant.old, mutant.new))
    return f"{mutant.file}:{mutant.line}  {mutant.kind}: {change}  {verdict['outcome']}{by}{more}"


class Results:
    """The verdicts, each appended to a file of JSON lines as soon as it is there."""

    def __init__(self, path: Path, keys: dict[str, str], budget: float):
        self.path, self.keys, self.lock = path, keys, threading.Lock()
        self.known: dict[str, dict] = {}
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                verdict = json.loads(line)
                met = verdict["budget"] or float("inf")  # a budget of 0: every test that runs the line
                enough = verdict["outcome"] != "survived" or met >= (budget or float("inf"))
                if verdict["key"] == keys[verdict["ran_in"]] and enough and verdict["outcome"] != "unjudged":
                    self.known[verdict["id"]] = verdict

    def add(self, mutant: Mutant, verdict: dict) -> None:
        verdict = {"key": self.keys[verdict["ran_in"]], "id": mutant.id, "file": mutant.file, "line": mutant.line, "kind": mutant.kind,
                   "change": mutant.change, **verdict}  # fmt: skip
        with self.lock:
            self.known[mutant.id] = verdict
            with self.path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(verdict) + "\n")
            print(line_of(mutant, verdict) + f"  [{verdict['seconds']:.1f} s]", flush=True)


def judge_all(todo: list[Mutant], judge: Judge, places: list[Workplace], results: Results, fork: bool) -> None:
    """One thread for each job takes mutants until none are left; the first that cannot go on ends all."""
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in sorted(todo, key=lambda mutant: judge.room_for(mutant)[0]):
        waiting.put(mutant)
    failures: list[BaseException] = []

    def work(place: Workplace) -> None:
        tests: dict[str, Tests] = {}
        try:
            while not failures:
                mutant = waiting.get_nowait()
                name, _ = judge.room_for(mutant)
                for other in [other for other in tests if other != name]:
                    tests.pop(other).close()  # the two warm processes would share the folder for temporary files
                tests.setdefault(name, Tests(place, judge.rooms[name], fork))
                start = time.monotonic()
                verdict = judge.judge(mutant, tests)
                results.add(mutant, {**verdict, "seconds": round(time.monotonic() - start, 2)})
        except queue.Empty:
            return
        except BaseException as error:  # noqa: B036  handed to the main thread
            failures.append(error)
        finally:
            for running in tests.values():
                running.close()

    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except KeyboardInterrupt as error:
        failures.append(error)
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def summary(mutants: list[Mutant], verdicts: dict[str, dict], rooms: dict[str, Room]) -> str:
    """One line a room, and one for all."""
    lines = []
    for name, sources in [*((name, room.sources) for name, room in rooms.items()), ("in all", None)]:
        of_room = [verdicts[mutant.id] for mutant in mutants
                   if mutant.id in verdicts and (sources is None or rooms[name].has(mutant.file))]
        counts = Counter(verdict["outcome"] for verdict in of_room)
        killed = counts["killed"] + counts["timeout"]
        judged = killed + counts["survived"] + counts["not covered"]
        seconds = [verdict["seconds"] for verdict in of_room if "seconds" in verdict]
        share = f"{100 * killed / judged:.1f} % killed ({killed} of {judged})" if judged else "nothing judged"
        each = f"; {sum(seconds) / len(seconds):.1f} s a mutant" if seconds else ""
        lines.append(f"{name}: {share}; " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) + each)
    return "\n".join(lines)


def run(root: Path, rooms: dict[str, Room], options: argparse.Namespace) -> int:
    """Everything after the command line; returns the exit status."""
    chosen = {name: room for name, room in rooms.items() if options.room in (None, name)}
    every, work = list(rooms.values()), options.work
    if not options.list:  # from here on the copy counts: the checkout may be edited meanwhile
        places = [Workplace(work / "job0", root, every)]
        root = places[0].tree
    mutants = sample(root, chosen, [name.rstrip("/") for name in options.only], options.count, options.seed)
    equivalent = read_equivalent(options.equivalent) if options.equivalent.is_file() else {}
    verdicts = {mutant.id: {"outcome": "equivalent", "why": equivalent[key]} for mutant in mutants
                if (key := (mutant.file, mutant.source, mutant.change)) in equivalent}
    if options.list:
        for mutant in mutants:
            print(line_of(mutant, verdicts.get(mutant.id, {"outcome": mutant.id})))
        return 0
    trees = {name: tree_hash(root, room, every) for name, room in rooms.items()}
    try:
        known = rooms if options.room is None else {**chosen, **_with_map(rooms, work, trees)}
        maps = maps_of(root, known, places[0], work, trees, options.tests)
        for number in range(1, options.jobs):
            shutil.rmtree(work / f"job{number}", ignore_errors=True)
            shutil.copytree(root, work / f"job{number}" / "tree")  # with the compiled files
            places.append(Workplace(work / f"job{number}", root, every))
    except CannotJudge as error:
        print(f"mutate.py: {error}", file=sys.stderr)
        return 2
    keys = {name: tree + "".join(f" {path}" for path in options.tests) for name, tree in trees.items()}
    results = Results(work / "results.jsonl", keys, options.budget)
    todo = [mutant for mutant in mutants if mutant.id not in results.known and mutant.id not in verdicts]
    print(f"{len(mutants)} mutants drawn with seed {options.seed}; {len(mutants) - len(todo)} need no run.", flush=True)
    judge = Judge(maps, rooms, options.budget)
    try:
        judge_all(todo, judge, places, results, can_fork() and not options.no_fork)
    except CannotJudge as error:
        print(f"mutate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    verdicts = {**results.known, **verdicts}
    alive = [mutant for mutant in mutants if verdicts[mutant.id]["outcome"] in ("survived", "not covered", "unjudged")]
    (work / "survivors.txt").write_text("\n".join(as_entry(mutant, "?") for mutant in alive), "utf-8")
    if judge.unsound:
        print("\nTests left out of judging, for they fail alone without any mutant:")
        print("\n".join(f"  {test}" for _, test in sorted(judge.unsound)))
    print("\nNot killed:" if alive else "\nAll killed.")
    for mutant in alive:
        print("  " + line_of(mutant, verdicts[mutant.id]))
    print("\n" + summary(mutants, verdicts, chosen))
    return 0


def _with_map(rooms: dict[str, Room], work: Path, trees: dict[str, str]) -> dict[str, Room]:
    """The rooms whose tier is recorded already: they can say whether other tests run a line."""
    return {name: room for name, room in rooms.items() if (work / f"map_{name}_{trees[name]}.json").is_file()}


def parser(description: str = "", root: Path = ROOT, rooms: dict[str, Room] = ROOMS) -> argparse.ArgumentParser:
    """The command line's options; `root` and `rooms` are the pack's own, or a toy's in a test."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--count", type=int, default=200, help="how many mutants to draw (default: 200)")
    made.add_argument("--only", action="append", default=[], metavar="PATH", help="only this file or folder")
    made.add_argument("--room", choices=sorted(rooms), help="only this room")
    made.add_argument("--jobs", type=int, default=1, help="warm processes at a time (default: 1)")
    made.add_argument("--list", action="store_true", help="list the mutants and stop")
    made.add_argument("--tests", action="append", default=[], metavar="PATH",
                      help="only these test files or folders, to try something out; the share is then of them alone")
    made.add_argument("--budget", type=float, default=0, metavar="SECONDS",
                      help="only so many seconds of tests a mutant, the cheapest; the share is then a lower bound")
    made.add_argument("--equivalent", type=Path, default=EQUIVALENT, metavar="FILE",
                      help="mutants that a person judged to change nothing")
    made.add_argument("--work", type=Path, default=root / "output" / "mutation", help="folder for all that is written")
    made.add_argument("--no-fork", action="store_true", help="a new process for each mutant")
    return made


def main(arguments: list[str], description: str) -> int:
    """The command line; returns the exit status."""
    options = parser(description).parse_args(arguments)
    os.environ.setdefault("STYLELOOM_HOST", str(ROOT / ".host" / "ComfyUI"))
    os.environ.setdefault("STYLELOOM_ACCELERATOR", "0")
    return run(ROOT, ROOMS, options)
