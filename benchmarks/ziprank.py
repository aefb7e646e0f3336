#!/usr/bin/env python3
"""Merging two SDXL LoRAs: time and memory against peft and a dense SVD, and what is left of each LoRA.

    python benchmarks/ziprank.py [--ranks 8,32,128] [--rounds N] [--threads N] [--parts time,memory,peers,loss] [--every N]

Two synthetic LoRAs over all 700 attention and feed-forward layers of SDXL (fp16, kohya's names) that share a known part
of their inputs. Prints one JSON line per figure:

* time: ZipRank fast, from one LORA_MODEL to the other (reading, gauge, solve, writing), median of the rounds, in a
  process of its own; also the least processor time, which a busy machine changes less. `--every 10` takes a tenth of
  the layers, and `--falling` makes the ups fall off to a hundredth, as those of trained LoRAs do.
* memory: one merge in a fresh process. The peak is the largest resident size of the process (getrusage) less what the
  interpreter and torch have before the files are made, so it holds the files, the result and all between; it stands
  beside the size of files and result together.
* peers: peft's add_weighted_adapter (svd, ties_svd, cat) and a plain dense SVD of the sum. They form every d_out × d_in
  matrix and take minutes, so one layer of each of the eight shapes is timed and multiplied by how often it occurs.
  Without peft on the path its lines are left out.
* loss: own-input loss ‖(L − L_k) P_k‖² / ‖L_k‖², mean of both LoRAs, P_k the projector onto the row space of LoRA k, by
  dense float64 matrices, at several overlaps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

from _pack import import_pack, machine

import_pack()

import torch  # noqa: E402

WIDE = ("input_blocks.4", "input_blocks.5", "output_blocks.3", "output_blocks.4", "output_blocks.5")


def shapes() -> dict[str, tuple[int, int]]:
    """Each layer → (out, in)."""
    from styleloom.weights.unet.architecture import SDXL

    found = {}
    for name in SDXL.weights:
        if "attn" not in name and "ff.net" not in name:
            continue
        width = 640 if name.startswith(WIDE) else 1280
        inner = 2048 if ".attn2.to_k" in name or ".attn2.to_v" in name else 4 * width if "ff.net.2" in name else width
        found[name] = (8 * width if "ff.net.0" in name else width, inner)
    return found


EVERY, FALLING = 1, False


def pair(shape: tuple[int, int], rank: int, seed: int, shared: float = 0.25, cosine: float = 0.8, dtype=torch.float16):
    """Two LoRAs' (down, up) of one layer; `shared` of the style's input directions lie at `cosine` to content's."""
    generator = torch.Generator().manual_seed(seed)
    out, inner = shape
    one, two = (torch.randn(rank, inner, generator=generator) / inner**0.5 for _ in range(2))
    n = round(shared * rank)
    two[:n] = cosine * one[:n] + (1 - cosine**2) ** 0.5 * two[:n]
    ups = [torch.randn(out, rank, generator=generator) * 0.02 for _ in range(2)]
    return [(down.to(dtype), up.to(dtype)) for down, up in zip((one, two), ups)]


def loras(rank: int) -> tuple[dict, dict]:
    """Content and style LORA_MODEL."""
    made: tuple[dict, dict] = ({}, {})
    for number, (name, shape) in list(enumerate(shapes().items()))[::EVERY]:
        stem = "lora_unet_" + name.replace(".", "_")
        for lora, (down, up) in zip(made, pair(shape, rank, number)):
            up = (up * torch.logspace(0, -2, rank)).to(up.dtype) if FALLING else up
            lora |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            lora[f"{stem}.alpha"] = torch.tensor(float(rank))
    return made


def fast(content: dict, style: dict, separation: float = 0.7) -> dict:
    """What the node does in mode fast, without the report's hashes and picture."""
    from styleloom.weights.lora.reading import read_lora
    from styleloom.weights.lora.writing import write_lora, written_dtype
    from styleloom.weights.merge.alignment import align, check_sizes
    from styleloom.weights.merge.fast import merge_fast
    from styleloom.weights.merge.priors import layer_prior

    read = [read_lora(lora, name) for lora, name in ((content, "content"), (style, "style"))]
    align(read, None)
    check_sizes(read, None)
    prior = layer_prior("soft", "sdxl")[0]
    merged = merge_fast(*read, (1.0, 1.0), prior, separation, True, 0, written_dtype(read))
    return write_lora(merged.adapters, {}, read, "sdxl", None, {})


def size_mb(*loras: dict) -> float:
    return sum(t.numel() * t.element_size() for lora in loras for t in lora.values()) / 1e6


def time_ours(rank: int, rounds: int) -> dict:
    content, style = loras(rank)
    files, seconds, processor = size_mb(content, style), [], []
    for _ in range(rounds):
        start, start_cpu = time.perf_counter(), time.process_time()
        fast(content, style)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_cpu)
    return {"what": "ours", "rank": rank, "median_s": round(median(seconds), 3), "min_s": round(min(seconds), 3),
            "max_s": round(max(seconds), 3), "min_cpu_s": round(min(processor), 3), "min_s_a_gb_of_files": round(min(seconds) / files * 1e3, 2),
            "files_mb": round(files), "layers": len(shapes()) // EVERY, "threads": torch.get_num_threads()}


def memory_ours(rank: int) -> dict:
    """For a process that has done nothing else."""
    tiny = {f"{stem}.{end}": t for stem in ("lora_unet_input_blocks_4_1_proj_in",) for end, t in (
        ("lora_down.weight", torch.ones(2, 8)), ("lora_up.weight", torch.ones(8, 2)))}
    fast(tiny, tiny)  # what torch allocates once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    content, style = loras(rank)
    with_files = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
    result = fast(content, style)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
    held = size_mb(content, style, result)
    return {"what": "memory", "rank": rank, "files_mb": round(size_mb(content, style)),
            "result_mb": round(size_mb(result)), "peak_with_the_files_alone_mb": round(with_files), "peak_mb": round(peak),
            "peak_over_files_and_result": round(peak / held, 3), "threads": torch.get_num_threads()}


def dense_svd(layer, rank: int) -> None:
    matrix = sum(up.float() @ down.float() for down, up in layer)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    (u[:, :rank] * s[:rank].sqrt()).contiguous(), (s[:rank, None].sqrt() * vh[:rank]).contiguous()


def peft_layer(layer, rank: int, combination: str):
    """A function that merges one layer by peft."""
    import peft

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(layer[0][0].shape[1], layer[0][1].shape[0], bias=False)

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    model = peft.get_peft_model(One(), config, adapter_name="a")
    model.add_adapter("b", config)
    for name, (down, up) in zip("ab", layer):
        model.base_model.model.layer.lora_A[name].weight.data = down.float()
        model.base_model.model.layer.lora_B[name].weight.data = up.float()
    more = {"svd_rank": rank} if "svd" in combination else {}
    more |= {"density": 0.5} if "ties" in combination else {}

    def run():
        with torch.no_grad():
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "m", combination_type=combination, **more)

    return run


def peers(rank: int, ours: float) -> None:
    count: dict[tuple[int, int], int] = {}
    for shape in shapes().values():
        count[shape] = count.get(shape, 0) + 1
    layers = {shape: pair(shape, rank, 1) for shape in count}
    ways = {"dense SVD": lambda layer: lambda: dense_svd(layer, rank)}
    try:
        import peft

        version = peft.__version__
        for kind in ("svd", "ties_svd", "cat"):
            ways[f"peft {version} {kind}"] = lambda layer, kind=kind: peft_layer(layer, rank, kind)
    except ImportError as error:
        print(json.dumps({"what": "peft is not on the path", "error": str(error)}), flush=True)
    for name, make in ways.items():
        total = 0.0
        for shape, number in count.items():
            run = make(layers[shape])
            start = time.perf_counter()
            run()
            total += number * (time.perf_counter() - start)
        print(json.dumps({"what": name, "rank": rank, "seconds_of_700_layers": round(total, 2),
                          "ratio_to_ours": round(total / ours, 1), "how": "one layer of each shape, times its number"}),
              flush=True)


def own_loss(merged: torch.Tensor, each: list[torch.Tensor]) -> float:
    total = 0.0
    for own in each:
        _, s, vh = torch.linalg.svd(own, full_matrices=False)
        rows = vh[s > 1e-6 * s[0]]
        total += float(((merged - own) @ rows.T).square().sum() / own.square().sum())
    return total / len(each)


def losses(rank: int, shape: tuple[int, int] = (320, 320), layers: int = 2) -> None:
    """All in float64, so that only the methods differ."""
    from styleloom.weights.lora.algebra import thin_svd
    from styleloom.weights.merge.methods import METHODS, Options
    from styleloom.weights.merge.ziprank import DUAL_GAIN, merge_pair

    for shared in (0.0, 0.25, 0.5, 1.0):
        for cosine in (0.5, 0.8, 0.95) if shared else (0.0,):
            found: dict[str, float] = {}
            for seed in range(layers):
                changes = [thin_svd(down, up) for down, up in pair(shape, rank, 50 + seed, shared, cosine, torch.float64)]
                dense = [(c.up * c.values) @ c.down for c in changes]
                for name, merge in METHODS.items():
                    if name not in ("SVD", "DARE"):
                        made, _ = merge(changes, Options(rank=2 * rank, target=str(seed)))
                        found[name] = found.get(name, 0) + own_loss(made.up @ made.down, dense) / layers
                for keep, gain in ((True, DUAL_GAIN), (False, DUAL_GAIN), (True, 1.0), (False, 1.0)):
                    made = merge_pair(*changes, 1.0, 1.0, 1.0, keep, gain)[0]
                    name = "ZipRank fast" + ("" if keep else ", keep_strength off") + (", masks alone" if gain == 1 else "")
                    found[name] = found.get(name, 0) + own_loss(made.up @ made.down, dense) / layers
            best_peer = min(found[name] for name in ("sum", "average", "TIES", "NP-LoRA"))
            print(json.dumps({"what": "own-input loss", "rank": rank, "shared": shared, "cosine": cosine,
                              "losses": {name: round(value, 4) for name, value in found.items()},
                              "ours_over_best_of_four": round(found["ZipRank fast"] / best_peer, 3)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8,32,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default="time,memory,peers,loss")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th layer (time and memory)")
    parser.add_argument("--falling", action="store_true", help="ups that fall off (time and memory)")
    parser.add_argument("--one", choices=["time", "memory"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    global EVERY, FALLING
    EVERY, FALLING = args.every, args.falling
    if args.one:
        rank = int(args.ranks)
        print(json.dumps(time_ours(rank, args.rounds) if args.one == "time" else memory_ours(rank)), flush=True)
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print(json.dumps({"what": "machine", **machine(), "torch": torch.__version__, "load_before": load}), flush=True)
    for rank in map(int, args.ranks.split(",")):
        ours = None
        for part in ("time", "memory"):
            if part in args.parts:
                command = [sys.executable, __file__, "--one", part, "--ranks", str(rank), "--rounds", str(args.rounds),
                           "--threads", str(args.threads), "--every", str(args.every)]
                command += ["--falling"] * args.falling
                line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
                print(line, flush=True)
                ours = json.loads(line).get("median_s", ours)
        if "peers" in args.parts and ours:
            peers(rank, ours)
    if "loss" in args.parts:
        losses(16)


if __name__ == "__main__":
    main()
