"""SigLIP2-G at full size on one picture: ours against transformers' class on the same weights file.

    python benchmarks/i2l_encode.py [--dtype bf16|fp32] [--runs 7] [--fresh 3] [--threads N]

Writes random weights (2.33 GB in bf16) to a temporary folder, removed at the end, and prints JSON lines:

- encode: both models in one process, taking turns after a warm-up each: medians of the time on the clock and
  of processor time (the steadier one on a busy machine, with --threads 1), and the medians over the turns of
  the ratio to transformers and to the matrix products of the blocks alone;
- fresh: each in processes of its own, from the file to the embedding; medians, the ratio, and the highest
  anonymous memory above that of the process before it opened the file (Linux; RssAnon, sampled).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median

from _pack import import_pack, machine

FILE = "model.safetensors"


def write_model(folder: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file
    from styleloom.weights.i2l import siglip2

    generator = torch.Generator().manual_seed(0)
    config = siglip2.SigLIP2Config()
    tensors = {}
    for key, shape in siglip2.key_shapes(config).items():
        tensor = torch.randn(shape, generator=generator).mul_(0.02)
        if "norm" in key and key.endswith("weight"):
            tensor += 1
        tensors[key] = tensor.to(torch_dtype(dtype))
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    theirs = {
        "model_type": "siglip_vision_model",
        "architectures": ["SiglipVisionModel"],
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "image_size": config.image,
        "patch_size": config.patch,
        "layer_norm_eps": config.eps,
        "hidden_act": "gelu_pytorch_tanh",
    }
    (folder / "config.json").write_text(json.dumps(theirs))


def torch_dtype(name: str):
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def load_ours(folder: Path, dtype: str):
    from safetensors.torch import load_file
    from styleloom.weights.i2l import towers

    return towers.build_tower(load_file(folder / FILE), FILE, dtype)


def load_theirs(folder: Path, dtype: str):
    from transformers import SiglipVisionModel

    model, report = SiglipVisionModel.from_pretrained(folder, dtype=torch_dtype(dtype), output_loading_info=True)
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys")):
        raise SystemExit("This transformers names the tensors otherwise (5.6 or later is needed).")
    return model.eval()


LOAD = {"ours": load_ours, "transformers": load_theirs}
ENCODE = {
    "ours": lambda model, pixels: model(pixels),
    "transformers": lambda model, pixels: model(pixel_values=pixels).pooler_output,
}


def picture(dtype: str):
    import torch

    return torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(1)).to(torch_dtype(dtype))


def timed(function, *arguments):
    """(seconds on the clock, seconds of processor time over all threads, result)."""
    start, start_cpu = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return time.perf_counter() - start, time.process_time() - start_cpu, result


def products(tower, pixels):
    """The matrix products of all blocks by themselves, on the weights as they lie in memory: what no
    implementation can do without."""
    import torch

    layers = [m for m in tower.encoder.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.ones(1, 576, m.in_features, dtype=pixels.dtype) for m in layers}
    for layer in layers:
        torch.nn.functional.linear(inputs[layer.in_features], layer.weight, layer.bias)


def compare(folder: Path, dtype: str, runs: int) -> dict:
    """Both models in this process, taking turns with each other and with the bare products."""
    import torch

    pixels = picture(dtype)
    with torch.inference_mode():
        models = {name: load(folder, dtype) for name, load in LOAD.items()}
        ways = {name: partial(ENCODE[name], model, pixels) for name, model in models.items()}
        ways["products"] = partial(products, models["ours"], pixels)
        results = {name: way() for name, way in ways.items()}
        turns = []
        for turn in range(runs):
            # The one that goes first changes from turn to turn.
            names = list(ways)[turn % 3 :] + list(ways)[: turn % 3]
            turns.append({name: timed(ways[name])[:2] for name in names})
    found = {}
    for at, kind in enumerate(("wall", "cpu")):
        for name in ways:
            found[f"{name}_{kind}_s"] = round(median(turn[name][at] for turn in turns), 3)
        for other in ("transformers", "products"):
            found[f"{kind}_ratio_to_{other}"] = round(median(turn["ours"][at] / turn[other][at] for turn in turns), 3)
    difference = (results["ours"].float() - results["transformers"].float()).abs().max().item()
    largest = results["transformers"].float().abs().max().item()
    return {**found, "max_difference": difference, "largest_value": largest, "turns": runs}


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Peak:
    """The highest anonymous memory while it is entered, above what there was at the start."""

    def __enter__(self):
        self.start = self.highest = anonymous_bytes()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.005):
            self.highest = max(self.highest, anonymous_bytes())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.highest = max(self.highest, anonymous_bytes())

    @property
    def above_start(self) -> int:
        return self.highest - self.start


def from_file(folder: Path, dtype: str, name: str) -> dict:
    """One model in this fresh process: from the file to the embedding."""
    import torch
    import transformers.models.siglip.modeling_siglip  # noqa: F401  imports count for neither
    from styleloom.weights.i2l import towers  # noqa: F401

    pixels = picture(dtype)

    def run():
        return ENCODE[name](LOAD[name](folder, dtype), pixels)

    with torch.inference_mode():
        if sys.platform != "linux":
            return {"seconds": timed(run)[0]}
        with Peak() as peak:
            seconds, *_ = timed(run)
    return {"seconds": seconds, "peak_anonymous_mb": peak.above_start / 1e6}


def worker(arguments: list[str]) -> dict:
    answer = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(answer.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--runs", type=int, default=7, help="turns of each model in one process")
    parser.add_argument("--fresh", type=int, default=3, help="fresh processes of each model")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--worker", choices=["compare", *LOAD], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()

    import_pack()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker == "compare":
        print(json.dumps(compare(options.folder, options.dtype, options.runs)))
        return
    if options.worker:
        print(json.dumps(from_file(options.folder, options.dtype, options.worker)))
        return

    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"benchmark": "i2l_encode", "dtype": options.dtype, **machine(), **versions}), flush=True)
    with tempfile.TemporaryDirectory(prefix="styleloom_bench_") as place:
        folder = Path(place)
        write_model(folder, options.dtype)
        common = ["--folder", place, "--dtype", options.dtype]
        if options.threads:
            common += ["--threads", str(options.threads)]
        compared = worker(["--worker", "compare", "--runs", str(options.runs), *common])
        print(json.dumps({"what": "encode", **compared}), flush=True)
        found = {name: [] for name in LOAD}
        for _ in range(options.fresh):
            for name in found:
                found[name].append(worker(["--worker", name, *common]))
        fresh = {"what": "fresh", "processes_each": options.fresh}
        for key, digits in (("seconds", 3), ("peak_anonymous_mb", 0)):
            if all(key in run for runs in found.values() for run in runs):
                values = {name: median(run[key] for run in runs) for name, runs in found.items()}
                fresh.update({f"{name}_{key}": round(value, digits) for name, value in values.items()})
                fresh[f"{key}_ratio"] = round(values["ours"] / values["transformers"], 3)
        print(json.dumps(fresh), flush=True)


if __name__ == "__main__":
    main()
