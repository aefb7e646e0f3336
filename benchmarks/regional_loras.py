#!/usr/bin/env python3
"""Four LoRAs with a mask each, at once, against plain CFG and the same LoRAs without masks.

    python benchmarks/regional_loras.py [--device cpu|cuda] [--model sdxl|flux2|z-image|all] [--rank R] [--count N]
                                        [--rounds N] [--steps N] [--threads N] [--hooks]

Starts the real ComfyUI in this process (STYLELOOM_HOST, or .host/ComfyUI) with the models of `asymmetric_cfg.py`, and
samples in turn:

* a: plain CFG without a LoRA.
* s: the LoRAs on the positive side, all of them everywhere.
* r: the same, each with a mask that covers a quarter of the picture with soft edges.
* h, with --hooks: what ComfyUI offers for it, a conditioning with a mask and a LoRA hook for each.

A step is the time between two callbacks of the sampler. Medians over all rounds after one step of each to warm up; the
processor's time of a step as well, for machines that do other work. One JSON line per way and figure.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from statistics import median

import torch
from _host import start
from _models import lora
from _pack import machine
from asymmetric_cfg import CFG, Bench, Sampled, show


def masks(count: int, side: int = 256) -> list[torch.Tensor]:
    """(1, side, side) each: columns of the picture, whose edges fade over an eighth of a column."""
    at = (torch.arange(side) + 0.5) / side * count
    columns = ((0.5 - (at - number - 0.5).abs()) * 8 + 0.5 for number in range(count))
    return [column.clamp(0, 1).expand(1, side, side).contiguous() for column in columns]


class Regional(Bench):
    """`Bench` with the ways of this file."""

    def __init__(self, nodes, name: str, rank: int, count: int, device: str):
        super().__init__(nodes, name, [rank], device)
        self.stack = [lora(self.spec, self.model, rank, 10 + seed, self.dtype) for seed in range(count)]
        self.masks = masks(count)

    def guider(self, way: str, rank: int | None):
        if way == "a":
            return super().guider(way, rank)
        if way == "h":
            return self._hooks()
        stack = ()
        for state, mask in zip(self.stack, self.masks):
            region = {"mask": mask} if way == "r" else {}
            stack = self.nodes["StyleLoomLoRAStack"].execute(lora=state, strength=0.5, stack=stack, **region)[0]
        return self.nodes["StyleLoomAsymmetricCFGGuider"].execute(
            model=self.model, positive=self.positive, negative=self.negative, cfg=CFG, positive_lora=stack
        )[0]

    def _hooks(self):
        import comfy.hooks
        import comfy.samplers

        positive = []
        for state, mask in zip(self.stack, self.masks):
            hooks = comfy.hooks.create_hook_lora(state, 0.5, 0.0)
            part = comfy.hooks.set_hooks_for_conditioning(self.positive, hooks)
            positive += comfy.hooks.set_mask_for_conditioning(part, mask, "default", 1.0)
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(positive, self.negative)
        guider.set_cfg(CFG)
        return guider


def measure(bench: Regional, name: str, options) -> None:
    results: dict[str, list[Sampled]] = defaultdict(list)
    ways = ["a", "s", "r"] + (["h"] if options.hooks else [])
    for turn in range(options.rounds + 1):
        for way in [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]:
            made = bench.sample(way, options.rank, options.steps if turn else 1)
            if turn:
                results[way].append(made)

    def middle(way, kind):
        return median(value for made in results[way] for value in getattr(made, kind))

    for way in ways:
        show(
            model=name,
            way=way,
            rank=options.rank,
            count=options.count,
            step_s=middle(way, "steps"),
            step_cpu_s=middle(way, "cpu"),
            first_step_s=median(made.first for made in results[way]),
            model_calls_per_step=results[way][-1].calls,
        )
    for way in ways[1:]:
        show(
            figure=f"{way}/a",
            model=name,
            rank=options.rank,
            count=options.count,
            value=middle(way, "steps") / middle("a", "steps"),
            by_processor_time=middle(way, "cpu") / middle("a", "cpu"),
            by_least_processor_time=min(v for m in results[way] for v in m.cpu)
            / min(v for m in results["a"] for v in m.cpu),
            **({"target": "<= 1.05"} if way == "r" else {}),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("sdxl", "flux2", "z-image", "all"), default="sdxl")
    parser.add_argument("--rank", type=int, default=16, help="of each LoRA")
    parser.add_argument("--count", type=int, default=4, help="of LoRAs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of each sampling run; the first is counted by itself")
    parser.add_argument("--threads", type=int, help="PyTorch's; its own choice if left out")
    parser.add_argument("--hooks", action="store_true", help="way h, too")
    options = parser.parse_args()
    if options.steps < 2 or options.rounds < 1:
        parser.error("at least 2 steps and 1 round: the first step is counted by itself")
    if options.threads:
        torch.set_num_threads(options.threads)
    nodes = start(options.device)
    about = {"device": options.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    show(benchmark="regional_loras", rounds=options.rounds, steps=options.steps, **about, **machine())
    for name in ("sdxl", "flux2", "z-image") if options.model == "all" else (options.model,):
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        show(model=name, load_average=load)
        measure(Regional(nodes, name, options.rank, options.count, options.device), name, options)


if __name__ == "__main__":
    main()
