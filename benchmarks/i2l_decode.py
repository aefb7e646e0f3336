#!/usr/bin/env python3
"""Decoding a full-size Z-Image predictor: time against reading its file, and against the straightforward way.

    python benchmarks/i2l_decode.py [--folder DIR] [--rounds N] [--threads N] [--cases read,bound,ours,straightforward]

Writes a predictor with the published key list and random bf16 weights once (3.23 GB, deleted at the end), then runs
each way in processes of their own, in turn, and prints one JSON line per figure:

* read: the whole file through one 16 MB buffer, from the warm page cache. The physical limit of using every byte.
* bound: read the file on all threads and multiply every matrix with 1 and 4 pictures' rows, and nothing else: no
  LoRA is kept, fused or measured. What a decoder made of torch's products cannot be faster than.
* ours: open, recognise, decode, fuse, report; what the node does. 1 and 4 pictures, reference and fp32 arithmetic.
* straightforward: build the predictor as a module, load its state dict, one small matmul after another, merge.

Peak anonymous memory is RssAnon above its value before the work (Linux), sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from _pack import import_pack, machine

IN_DIM = 5632
CASES = (
    "read",
    "bound 1",
    "bound 4",
    "ours 1",
    "ours 4",
    "ours 1 fp32",
    "ours 4 fp32",
    "straightforward 1",
    "straightforward 4",
)


def write_predictor(path: Path) -> None:
    """The published layout, with values of a plausible size, written in order without holding the file in memory."""
    import torch
    from styleloom.weights.i2l.layouts import FAMILIES, PredictorSpec, key_shapes

    family = FAMILIES["z-image"]
    header, at = {}, 0
    for key, (rows, columns) in key_shapes(PredictorSpec(family, 128, IN_DIM, 4, family.widths)).items():
        header[key] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, at + 2 * rows * columns]}
        at += 2 * rows * columns
    raw = json.dumps(header).encode()
    block = (torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    data = block.view(torch.uint8).numpy().tobytes()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for start in range(0, at, len(data)):
            f.write(data[: at - start])


def read(path: Path) -> None:
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as f:
        while f.readinto(buffer):
            pass


def bound(path: Path, embeddings) -> None:
    import torch
    from styleloom.weights.i2l.decode import _GROUP
    from styleloom.weights.parallel import map_single_threaded
    from styleloom.weights.tensor_file import TensorFile, read_header

    rows = -(-len(embeddings) // _GROUP) * _GROUP
    header = read_header(path)
    ones = {
        columns: torch.ones(rows, columns, dtype=torch.bfloat16)
        for columns in {info.shape[1] for info in header.tensors.values()}
    }
    with TensorFile(header) as file:

        def multiply(key: str) -> None:
            for piece in file.rows(key, torch.bfloat16):
                for group in ones[piece.shape[1]].split(_GROUP):
                    torch.nn.functional.linear(group, piece)

        with map_single_threaded(multiply, header.tensors, at_once=14) as results:
            for _ in results:
                pass


def ours(path: Path, embeddings, arithmetic: str):
    from styleloom.weights.i2l.predict import open_predictor, predict_lora
    from styleloom.weights.i2l.references import References

    references = References(embeddings, tuple(map(str, range(len(embeddings)))))
    return predict_lora(open_predictor(path), references, arithmetic=arithmetic).factors


def straightforward(path: Path, embeddings):
    """As the publisher's pipeline does it: a module in memory, picture after picture, then the merge."""
    import torch
    from safetensors.torch import load_file
    from styleloom.weights.i2l.layouts import FAMILIES, targets

    state = load_file(str(path))
    layers = torch.nn.ModuleDict(
        {
            key.removesuffix(".weight").replace(".", "/"): torch.nn.Linear(
                w.shape[1], w.shape[0], bias=False, dtype=w.dtype
            )
            for key, w in state.items()
        }
    )
    layers.load_state_dict({key.removesuffix(".weight").replace(".", "/") + ".weight": w for key, w in state.items()})
    family = FAMILIES["z-image"]
    loras = []
    with torch.no_grad():
        for x in embeddings.split(1):
            lora = {}
            for t in targets(family):
                stem = t.stored.replace(".", "/")
                a = layers[f"{stem}/proj_a/proj_out"](layers[f"{stem}/proj_a/proj_in"](x))
                b = layers[f"{stem}/proj_b/proj_out"](layers[f"{stem}/proj_b/proj_in"](x))
                lora[t.name] = (a.view(4, family.widths[t.a_width]), b.view(family.widths[t.b_width], 4))
            loras.append(lora)
    return {
        name: (
            torch.cat([lora[name][0] for lora in loras]) * (1 / len(loras)),
            torch.cat([lora[name][1] for lora in loras], dim=1),
        )
        for name in loras[0]
    }


def anonymous_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Highest RssAnon while the block runs, above its start; 0 where the system does not tell."""

    def __enter__(self):
        self.peak, self._stop = 0, threading.Event()
        self._start = anonymous_memory() if sys.platform == "linux" else 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if sys.platform == "linux":
            self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, anonymous_memory() - self._start)

    def __exit__(self, *exc):
        self._stop.set()


def run_case(case: str, path: Path, threads: int) -> dict:
    """In a process of its own: once to warm up, once counted."""
    import torch

    torch.set_num_threads(threads)
    way, *rest = case.split()
    count = int(rest[0]) if rest else 0
    x = torch.randn(count, IN_DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    work = {
        "read": lambda: read(path),
        "bound": lambda: bound(path, x),
        "ours": lambda: ours(path, x, "fp32" if "fp32" in rest else "reference"),
        "straightforward": lambda: straightforward(path, x),
    }[way]
    with PeakMemory() as memory:
        work()
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - start_cpu,
        "peak": memory.peak,
    }


def check_equal(path: Path) -> None:
    """Both ways give the same LoRA, else the comparison would mean nothing."""
    import torch

    x = torch.randn(2, IN_DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    a, b = ours(path, x, "reference"), straightforward(path, x)
    for name, pair in a.items():
        for mine, theirs in zip(pair, b[name]):
            assert (mine.float() - theirs.float()).abs().max() <= 2**-7 * theirs.float().abs().max(), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=None, help="where the 3.23 GB file goes for the time of the run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default="read,bound,ours,straightforward", help="the ways to run")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import_pack()
    if options.case:
        print(json.dumps(run_case(options.case, Path(options.path), options.threads)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write_predictor(path)
        if "straightforward" in options.cases:
            check_equal(path)
        cases = [case for case in CASES if case.split()[0] in options.cases.split(",")]
        times, peaks = {case: [] for case in cases}, dict.fromkeys(cases, 0)
        processor = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case in cases:
                command = [
                    sys.executable,
                    __file__,
                    "--case",
                    case,
                    "--path",
                    str(path),
                    "--threads",
                    str(options.threads),
                ]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                times[case].append(result["seconds"])
                processor[case].append(result["cpu"])
                peaks[case] = max(peaks[case], result["peak"])

    def show(case: str, other: str, target: str) -> None:
        """The median over the rounds: both ran in the same minute, under about the same load."""
        if case in cases and other in cases:
            clock = median(mine / theirs for mine, theirs in zip(times[case], times[other]))
            fastest = min(processor[case]) / min(processor[other])
            print(json.dumps({"figure": f"{case} / {other}", "value": round(clock, 3),
                              "by_processor_time": round(fastest, 3), "target": target}))  # fmt: skip

    print(
        json.dumps(
            {
                "benchmark": "i2l_decode",
                "file_gb": 3.226,
                "threads": options.threads,
                "rounds": options.rounds,
                **machine(),
            }
        )
    )
    for case in cases:
        print(
            json.dumps(
                {
                    "case": case,
                    "median_s": round(median(times[case]), 3),
                    "min_s": round(min(times[case]), 3),
                    "max_s": round(max(times[case]), 3),
                    "min_cpu_s": round(min(processor[case]), 3),
                    "peak_anonymous_mb": round(peaks[case] / 1e6),
                }
            )
        )
    for count, limit in ((1, 1.5), (4, 1.8)):
        for suffix in ("", " fp32"):
            show(f"ours {count}{suffix}", "read", "none" if suffix else f"<= {limit}")
        show(f"bound {count}", "read", "what no such decoder gets below")
        show(f"ours {count}", f"bound {count}", "for comparison")
        show(f"straightforward {count}", f"ours {count}", ">= 2")
    for case, target in (("ours 4", "<= 300"), ("straightforward 4", "for comparison")):
        if case in cases:
            peak = round(peaks[case] / 1e6, 3)
            print(json.dumps({"figure": f"peak anonymous MB, {case}", "value": peak, "target": target}))


if __name__ == "__main__":
    main()
