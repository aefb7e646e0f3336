#!/usr/bin/env python3
"""Made-up safetensors files by the thousand: only our error may come out, and nothing wrong may be accepted.

    python benchmarks/fuzz_headers.py [--cases 100000] [--seed 0]

Good files, files with one or two changes, cut files, flipped bytes, arbitrary JSON, arbitrary bytes, deep nesting
(tests/unit/header_cases.py). Each is read by our header reader and by safetensors' own loader. Prints one JSON line
with the counts, or stops at the first case on which the two disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from _pack import ROOT, import_pack, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import_pack()
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    import safetensors
    from header_cases import check, files
    from hypothesis import HealthCheck, Phase, given, seed, settings

    found: Counter[tuple[bool, bool]] = Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.safetensors"

        @seed(options.seed)
        @settings(
            max_examples=options.cases,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(content=files)
        def run(content: bytes) -> None:
            found[check(path, content)] += 1

        run()
    record = {
        "benchmark": "fuzz_headers",
        "seed": options.seed,
        "cases": sum(found.values()),
        "accepted_by_both": found[True, True],
        "refused_by_both": found[False, False],
        "refused_by_us_alone": found[False, True],
        "accepted_by_us_alone": found[True, False],
        "other_exceptions": 0,
        "seconds": round(time.perf_counter() - start),
        "safetensors": safetensors.__version__,
    }
    print(json.dumps({**record, **machine()}))


if __name__ == "__main__":
    main()
