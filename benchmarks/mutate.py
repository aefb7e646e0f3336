#!/usr/bin/env python3
"""How many wrong changes of the code do the tests notice?

    python benchmarks/mutate.py --list                    the mutants that would be judged; runs nothing
    python benchmarks/mutate.py                           judge 200 of them
    python benchmarks/mutate.py --room host --count 40    only nodes/host/, judged by tests/host
    python benchmarks/mutate.py --only weights/merge      only this folder or file (may be given several times)

A mutant is one small wrong change of one line: another comparison, another constant, two arguments swapped, a call
left out (benchmarks/mutation/mutants.py lists the kinds). A seeded random sample is drawn, at most one a line. The
tests of the mutant's own room judge it: tests/unit for weights/, tests/host for nodes/host/; a file of weights/ that
only tests/host run is judged by those, and its line says so.

Run it with a Python that has what the tests need (`.venv/bin/python` after `python run.py test`). STYLELOOM_HOST
names the ComfyUI folder; without it, the one that run.py put under .host is taken.

First each tier runs once with a mark before each statement, which notes the tests that run it and their time. That is
kept, and used again until the code or the tests change. Then each mutant meets the tests that run its line, cheapest
first, up to the first failure. A warm process with the host and torch forks for each (Linux; elsewhere, or with
--no-fork, a new process starts each time, which takes far longer). Mutants are written only into copies
of the tree, taken at the start: the checkout may be edited meanwhile, and the verdicts are of the copy.

Each mutant is
    killed       a test failed that passes on the code as it is
    timeout      its tests took over three times as long as usual and ten seconds more; counts as killed
    survived     its tests pass
    not covered  no test of the room runs the line; counts as survived
    unjudged     its tests are too slow even without the mutant (a busy machine), or fail alone; left out of the share
    equivalent   it stands in benchmarks/mutants_that_change_nothing.txt; left out of the share

Everything is written below output/mutation: results.jsonl (one verdict a line; a stopped run goes on where it was),
survivors.txt (in the form that mutants_that_change_nothing.txt wants), and log.txt of each job.
"""

from __future__ import annotations

import sys

from mutation.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
