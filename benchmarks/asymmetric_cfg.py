#!/usr/bin/env python3
"""Asymmetric CFG against plain CFG, a merged LoRA and ComfyUI's weight hooks, at real layer widths.

    python benchmarks/asymmetric_cfg.py [--device cpu|cuda] [--model sdxl|flux2|z-image|all] [--ranks 16,64,128]
                                        [--rounds N] [--steps N] [--threads N] [--full | --curve [--sides A,B]]

Starts the real ComfyUI in this process (STYLELOOM_HOST, or .host/ComfyUI), builds a model with random weights (fp32 on
a CPU and bf16 on a GPU; on a CPU with few blocks and tokens) and samples it in turn:

* a: plain CFG without a LoRA.
* b: plain CFG, the LoRA merged by ComfyUI's loader: both sides have it.
* c: the LoRA on the positive side through ComfyUI's weight hooks.
* d: Asymmetric CFG, the LoRA on the positive side.
* e: Asymmetric CFG with a LoRA on either side.

A step is the time between two callbacks of the sampler, the first step that from the call of the guider to its first
callback. Medians over all rounds after one step of each to warm up. d is measured at every rank; b, c and e at rank 64 (or the
first one given), with --full at all. One JSON line per way and figure.

With --curve instead: a, c and d at rank 64 over pictures of several sizes, from a few tokens to those of 256 pixels and
more. Weight hooks patch the same weights in every step, however short it is, so c/d falls as steps grow longer; the last
line says at which length of a step of d it is 2, read from the curve.

Two lines say what bounds d: `floor` counts the operations and bytes of one step, and runs the low-rank products that d
has more than a by themselves, with nothing around them; `memory` follows every tensor from the making of the guider on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import weakref
from collections import Counter, defaultdict
from itertools import pairwise
from statistics import median

import torch
from _host import start
from _models import conditioning, lora, patcher, spec
from _pack import machine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

CFG = 4.0
PATCHING = ("patch_weight_to_device", "patch_hook_weight_to_device", "patch_cached_hook_weights")
# Latents for --curve; the last but one is a picture of 256 pixels.
SIDES = {"sdxl": (8, 16, 24, 32, 48), "flux2": (4, 8, 12, 16, 24), "z-image": (8, 16, 24, 32, 48)}
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm)
FLOPS = {
    aten.addmm_: lambda goal, a, b, *rest, **more: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Sampled:
    """What one sampling run took, in seconds on the clock and of the processor."""

    def __init__(self):
        self.prepare = self.first = 0.0
        self.steps: list[float] = []
        self.cpu: list[float] = []
        self.patches = self.calls = 0


class Bench:
    """One model, its prompts and its LoRAs, and the ways to sample it."""

    def __init__(self, nodes, name: str, ranks: list[int], device: str):
        self.nodes, self.spec = nodes, spec(name, device != "cpu")
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.model = patcher(self.spec, self.dtype)
        self.loras = {r: [lora(self.spec, self.model, r, seed, self.dtype) for seed in (1, 2)] for r in ranks}
        self.positive, self.negative = (conditioning(self.spec, seed) for seed in (3, 4))
        self.resize(self.spec.latent[-1])
        self.batches: list[int] = []
        self.model.model.diffusion_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.batches.append((args[0] if args else kwargs["x"]).shape[0]),
            with_kwargs=True,
        )

    def resize(self, side: int) -> None:
        """Latents of side × side from here on."""
        self.latent = torch.zeros(1, self.spec.latent[0], side, side)
        self.noise = torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(5))

    def guider(self, way: str, rank: int | None):
        import comfy.hooks
        import comfy.samplers
        import comfy.sd

        if way in "de":
            style, gray = self.loras[rank]
            return self.nodes["StyleLoomAsymmetricCFGGuider"].execute(
                model=self.model,
                positive=self.positive,
                negative=self.negative,
                cfg=CFG,
                positive_lora=style,
                **({"negative_lora": gray} if way == "e" else {}),
            )[0]
        model, positive = self.model, self.positive
        if way == "b":
            model, _ = comfy.sd.load_lora_for_models(model, None, self.loras[rank][0], 1.0, 0.0)
        if way == "c":
            hooks = comfy.hooks.create_hook_lora(self.loras[rank][0], 1.0, 0.0)
            positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, self.negative)
        guider.set_cfg(CFG)
        return guider

    def sample(self, way: str, rank: int | None, steps: int, at_step=None) -> Sampled:
        """One run of the Euler sampler; `at_step` is called after every step."""
        import comfy.samplers

        sigmas = comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "simple", steps)
        made, marks = Sampled(), []

        def callback(step, *_):
            synchronize()
            marks.append((time.perf_counter(), time.process_time()))
            if at_step is not None:
                at_step(step)

        start = time.perf_counter()
        with torch.inference_mode():
            guider = self.guider(way, rank)
            made.prepare = time.perf_counter() - start
            self.batches.clear()
            counted = Counted()
            with counted:
                synchronize()
                start = time.perf_counter()
                out = guider.sample(
                    self.noise, self.latent, comfy.samplers.sampler_object("euler"), sigmas,
                    callback=callback, disable_pbar=True, seed=5,
                )  # fmt: skip
        assert out.isfinite().all(), f"way {way}: the result is not finite"
        made.first = marks[0][0] - start
        made.steps = [after[0] - before[0] for before, after in pairwise(marks)]
        made.cpu = [after[1] - before[1] for before, after in pairwise(marks)]
        made.patches, made.calls = counted.calls, len(self.batches) / steps
        return made


class Counted:
    """Counts how often ComfyUI patches a weight while the block runs."""

    def __enter__(self):
        import comfy.model_patcher

        self.calls, self._before = 0, []
        for cls in (comfy.model_patcher.ModelPatcher, getattr(comfy.model_patcher, "ModelPatcherDynamic", None)):
            for name in PATCHING:
                if cls is not None and name in vars(cls):
                    self._before.append((cls, name, vars(cls)[name]))
                    setattr(cls, name, self._counting(vars(cls)[name]))
        return self

    def _counting(self, method):
        def run(patcher, *args, **kwargs):
            # Loading calls it for every weight; it does something only where the model has a patch for it.
            key = kwargs.get("key", args[0] if args else None)
            self.calls += "hook" in method.__name__ or key in patcher.patches
            return method(patcher, *args, **kwargs)

        return run

    def __exit__(self, *exc):
        for cls, name, method in self._before:
            setattr(cls, name, method)


class Ledger(TorchDispatchMode):
    """Follows every operation: memory of the tensors that live, matrix products by shape, and bytes read and written."""

    def __init__(self, device: str):
        super().__init__()
        self._device, self._alive = device, {}
        self.live = self.peak = 0
        self.begin()

    def begin(self) -> None:
        """Count products and bytes from here on."""
        self.products, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if func.is_view:
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in given + made)
        if func.overloadpacket in PRODUCTS:
            self.products[func, tuple((tuple(t.shape), t.stride(), t.dtype) for t in given)] += 1
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if tensor.device.type == self._device and storage._cdata not in known:
                self._follow(storage)
        return out

    def _follow(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_):
            self._alive.pop(key, None)
            self.live -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def observe(bench: Bench, way: str, rank: int | None, device: str) -> tuple[Ledger, int]:
    """(the second step's operations and the highest memory of the whole run, the second step's FLOPs)."""
    gc.collect()
    flops, ledger = FlopCounterMode(display=False, custom_mapping=FLOPS), Ledger(device)
    counted, second = [], []

    def mark(step):
        counted.append(flops.get_total_flops())
        second.append((ledger.products, ledger.bytes))
        ledger.begin()

    with ledger, flops:
        bench.sample(way, rank, 2, mark)
    ledger.products, ledger.bytes = second[1]
    return ledger, counted[1] - counted[0]


def seconds_alone(products: Counter, device: str) -> float:
    """The products by themselves, each on tensors of its own: the fastest of seven turns, as it is to be a bound."""
    calls = []
    for (func, operands), count in products.items():
        for _ in range(count):
            calls.append((func, [torch.empty_strided(*o[:2], dtype=o[2], device=device).fill_(0.01) for o in operands]))

    def run():
        for func, operands in calls:
            func(*operands)

    times = []
    with torch.inference_mode():
        for _ in range(7):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times.append(time.perf_counter() - start)
    return min(times)


def show(**line) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps(rounded), flush=True)


def size_of(state: dict) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def floors(bench: Bench, name: str, ranks: list[int], step_of_a: float, device: str) -> None:
    plain, own = observe(bench, "a", None, device)
    for rank in ranks:
        ours, flops = observe(bench, "d", rank, device)
        added = ours.products - plain.products
        alone = seconds_alone(added, device)
        show(
            what="floor",
            model=name,
            rank=rank,
            a_gflop=own / 1e9,
            added_gflop=(flops - own) / 1e9,
            added_share=(flops - own) / own,
            a_gb=plain.bytes / 1e9,
            added_gb=(ours.bytes - plain.bytes) / 1e9,
            added_products=added.total(),
            added_products_s=alone,
            bound_d_over_a=1 + alone / step_of_a,
        )
        adapters, more = size_of(bench.loras[rank][0]), ours.peak - plain.peak
        show(
            what="memory",
            model=name,
            rank=rank,
            adapters_mb=adapters / 1e6,
            peak_a_mb=plain.peak / 1e6,
            peak_d_mb=ours.peak / 1e6,
            extra_mb=more / 1e6,
            extra_over_adapters=more / adapters,
            target="<= 1.1",
            # On a CPU it is used where it lies, so `extra` is without it.
            **({"with_the_lora_itself": more / adapters + 1} if device == "cpu" else {}),
        )


def measure(bench: Bench, name: str, options, ranks: list[int]) -> float:
    """Prints ways and figures of one model; returns the fastest step of a."""
    others = ranks if options.full else [64 if 64 in ranks else ranks[0]]
    results: dict[tuple, list[Sampled]] = defaultdict(list)
    for turn in range(options.rounds + 1):
        turned = ranks[turn % len(ranks) :] + ranks[: turn % len(ranks)]
        bench.sample("a", None, 1)  # takes away what b left in the weights
        ways = [("a", None)] + [("d", rank) for rank in turned] + [("e", rank) for rank in others] + [("a", None)]
        if turn:
            ways += [("c", rank) for rank in others] + [("b", rank) for rank in others]
        for way, rank in ways:
            made = bench.sample(way, rank, options.steps if turn else 1)
            if turn:
                results[way, rank].append(made)

    def steps(way, rank, kind="steps"):
        return median(value for made in results[way, rank] for value in getattr(made, kind))

    def first(way, rank):
        return median(made.first for made in results[way, rank])

    for (way, rank), made in sorted(results.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        every = [value for one in made for value in one.steps]
        show(
            model=name,
            way=way,
            **({} if rank is None else {"rank": rank}),
            step_s=median(every),
            min_s=min(every),
            max_s=max(every),
            steps=len(every),
            step_cpu_s=steps(way, rank, "cpu"),
            first_step_s=first(way, rank),
            prepare_s=median(one.prepare for one in made),
            model_calls_per_step=made[-1].calls,
            weight_patches=max(one.patches for one in made),
        )
    limit = "<= 1.08" if options.device == "cpu" else "<= 1.05"
    for rank in ranks:
        show(
            figure="d/a",
            model=name,
            rank=rank,
            value=steps("d", rank) / steps("a", None),
            by_processor_time=steps("d", rank, "cpu") / steps("a", None, "cpu"),
            by_fastest_step=min(v for m in results["d", rank] for v in m.steps)
            / min(v for m in results["a", None] for v in m.steps),
            **({"target": limit} if rank == 64 else {}),
        )
    for rank in others:
        for way in "eb":
            show(figure=f"{way}/a", model=name, rank=rank, value=steps(way, rank) / steps("a", None))
        show(figure="c/d", model=name, rank=rank, value=steps("c", rank) / steps("d", rank), target=">= 2")
        for way in "dbc":
            ratio = first(way, rank) / first("a", None)
            show(figure=f"first step, {way}/a", model=name, rank=rank, value=ratio)
        patches = max(made.patches for made in results["d", rank])
        show(figure="weight patches while sampling, d", model=name, rank=rank, value=patches, target="0")
    return min(value for made in results["a", None] for value in made.steps)


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """Where a curve of (length of a step, ratio) falls through `level`, or None where it does not.

    Between two points the ratio is taken to be a straight line over 1/length: so many patches, and so many calls of the
    model, divided by the length.
    """
    for (short, high), (long, low) in pairwise(sorted(points)):
        if high >= level > low:
            share = (high - level) / (high - low)
            return 1 / (1 / short + share * (1 / long - 1 / short))
    return None


def curve(bench: Bench, name: str, options, rank: int) -> None:
    """Prints c/d over the length of a step, and where it is 2."""
    points = []
    for side in [int(side) for side in options.sides.split(",")] if options.sides else SIDES[name]:
        bench.resize(side)
        made: dict[str, list[Sampled]] = defaultdict(list)
        for turn in range(options.rounds + 1):
            for way in "adca":
                found = bench.sample(way, None if way == "a" else rank, options.steps if turn else 1)
                if turn:
                    made[way].append(found)
        a, c, d = (median(value for one in made[way] for value in one.steps) for way in "acd")
        cpu = {way: median(value for one in made[way] for value in one.cpu) for way in "acd"}
        points.append((d, c / d))
        show(
            what="curve",
            model=name,
            rank=rank,
            latent=[bench.spec.latent[0], side, side],
            a_step_s=a,
            d_step_s=d,
            c_step_s=c,
            **{"d/a": d / a, "c/d": c / d},
            by_processor_time={"d/a": round(cpu["d"] / cpu["a"], 4), "c/d": round(cpu["c"] / cpu["d"], 4)},
        )
    at = crossing(points, 2)
    ends = f"{max(ratio for _, ratio in points):.2f} to {min(ratio for _, ratio in points):.2f}"
    show(figure="step of d at which c/d is 2", model=name, rank=rank, value=at, **({} if at else {"c/d": ends}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("sdxl", "flux2", "z-image", "all"), default="all")
    parser.add_argument("--ranks", default="16,64,128")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of each sampling run; the first is counted by itself")
    parser.add_argument("--threads", type=int, help="PyTorch's; its own choice if left out")
    parser.add_argument("--full", action="store_true", help="b, c and e at every rank, too")
    parser.add_argument("--curve", action="store_true", help="c/d over the length of a step, and nothing else")
    parser.add_argument("--sides", help="of --curve's latents, for example 8,16; its own if left out")
    options = parser.parse_args()
    ranks = [int(rank) for rank in options.ranks.split(",")]
    if options.steps < 2 or options.rounds < 1:
        parser.error("at least 2 steps and 1 round: the first step is counted by itself")
    if options.threads:
        torch.set_num_threads(options.threads)
    nodes = start(options.device)
    about = {"device": options.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    show(benchmark="asymmetric_cfg", rounds=options.rounds, steps=options.steps, **about, **machine())
    for name in ("sdxl", "flux2", "z-image") if options.model == "all" else (options.model,):
        bench = Bench(nodes, name, ranks, options.device)
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        weights = size_of(bench.model.model.state_dict())
        targets = sum(key.endswith("lora_up.weight") for key in bench.loras[ranks[0]][0])
        show(model=name, weights_gb=weights / 1e9, targets=targets, latent=list(bench.spec.latent), load_average=load)
        if options.curve:
            curve(bench, name, options, 64 if 64 in ranks else ranks[0])
        else:
            floors(bench, name, ranks, measure(bench, name, options, ranks), options.device)
        del bench
        import comfy.model_management

        comfy.model_management.unload_all_models()
        gc.collect()


if __name__ == "__main__":
    main()
