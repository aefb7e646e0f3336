#!/usr/bin/env python3
"""What injecting a style costs: added time per call of the UNet, preparing a new reference, and memory afterwards.

    python benchmarks/style_injection.py --host COMFYUI [--rounds N] [--threads N] [--dtype fp32|bf16]
                                         [--cases layers graph widths prepare]

Ours against the usual way, written from its description: every cross-attention is patched whatever the preset, reads
the step's sigma back in every layer, projects K and V of the picture's tokens in every call with the layers of a
module that was built for the reference, and adds weight · attention. Both use the host's attention.

What is added is timed inside the calls: the replacements' own time, and our wrapper's, less that of the text's attention
in them. (The difference of whole calls says the same where the rest of the UNet does not drown it.)

* layers: the 70 cross-attentions of SDXL at their real widths and the tokens of 1024 × 1024, one after the other,
  both sides of guidance: all the work that injection adds to a call, without the rest of the UNet.
* graph: the UNet of SDXL with its 70 layers at a tenth of the width. widths: the UNet at SDXL's widths, one layer deep
  (11 cross-attentions). Whole calls through the host's model.
* prepare: from encoded pictures to a patched model, with a base adapter of full size in fp16 (0.7 GB, random).
* memory: of the keys and values of all 70 layers at 16 tokens, in bf16.

Times are medians of the process's processor time (steadier than the clock on a busy machine) and of the clock; ways
take turns within a round, and a figure is the median over the rounds. One JSON line per result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

from _pack import import_pack, machine

PRESETS = ("style", "all")
ATTENTIONS = {"default": [], "torch": ["--use-pytorch-cross-attention"]}
TARGETS = {"style": 0.15, "all": 0.35}
PREPARE_TARGETS = {"style": 20, "all": 5}


def start_host(path: str, threads: int, kind: str) -> None:
    """Import the host from its folder, on the CPU, with its default attention there or with torch's own, which is the
    default on most GPUs."""
    sys.path.insert(0, path)
    argv, sys.argv = sys.argv, ["main.py", "--cpu", *ATTENTIONS[kind]]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  reads sys.argv
    import torch

    sys.argv = argv
    torch.set_num_threads(threads)
    import_pack()
    from styleloom.nodes.host.style import attention, replacement

    host = replacement.optimized_attention
    replacement.optimized_attention = lambda *args, **kwargs: WATCH.text(host, *args, **kwargs)
    for of, name in ((replacement.Replacement, "__call__"), (attention.StyleAttention, "apply_model")):
        setattr(of, name, WATCH.around(getattr(of, name)))


def random_adapter(channels: int, cross: int, width: int, architecture, dtype, tokens: int = 4):
    """A base adapter with random values, without a file."""
    import torch
    from styleloom.weights.ip_adapter.formats import BASE, Adapter

    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)  # noqa: E731
    levels = {layer: 2 if (layer[0], layer[1]) in LEVEL_2 else 4 for layer in architecture.layers}
    layers = {n: (draw(levels[layer] * channels, cross), draw(levels[layer] * channels, cross))
              for layer, n in architecture.file_numbers.items()}  # fmt: skip
    proj = {"proj.weight": draw(tokens * cross, width), "proj.bias": draw(tokens * cross), "norm.weight": draw(cross),
            "norm.bias": draw(cross)}  # fmt: skip
    return Adapter("random", BASE, "image_embeds", width, cross, tokens, None, architecture, proj, layers)


LEVEL_2 = {("input", 4), ("input", 5), ("output", 3), ("output", 4), ("output", 5)}  # SDXL's blocks of 640


class Watch:
    """Processor time of what injection adds: a replacement's own time less that of the text's attention inside it."""

    def __init__(self):
        self.added = 0.0

    def text(self, function, *args, **kwargs):
        """Text attention, which there would be anyway; also an override for it, as image attention has few keys."""
        if args[1].shape[1] != TEXT_TOKENS:
            return function(*args, **kwargs)
        begin = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            self.added -= time.process_time() - begin

    def around(self, run: Callable) -> Callable:
        """A replacement, or anything of which all but the text's attention is added."""

        def timed(*args, **kwargs):
            begin = time.process_time()
            try:
                return run(*args, **kwargs)
            finally:
                self.added += time.process_time() - begin

        return timed

    def without(self, run: Callable) -> Callable:
        """The UNet inside our wrapper: not added."""

        def timed(*args, **kwargs):
            begin = time.process_time()
            try:
                return run(*args, **kwargs)
            finally:
                self.added -= time.process_time() - begin

        return timed


TEXT_TOKENS = 77
WATCH = Watch()


class Usual:
    """The usual way. `build` is what a new reference costs, `patch` what is registered, `__call__` a layer."""

    def __init__(self, adapter, dtype):
        self.adapter, self.dtype = adapter, dtype

    def build(self, embeds):
        """The image projection and one Linear for each matrix, initialised and then loaded; the tokens of both sides."""
        import torch

        proj = torch.nn.ModuleDict({"proj": torch.nn.Linear(embeds.shape[1], self.adapter.tokens * self.adapter.cross),
                                    "norm": torch.nn.LayerNorm(self.adapter.cross)})  # fmt: skip
        proj.load_state_dict(dict(self.adapter.projection))
        holder = torch.nn.ModuleDict({
            f"{number}_{name}": torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
            for number, pair in self.adapter.layers.items() for name, matrix in zip("kv", pair)})  # fmt: skip
        holder.load_state_dict({f"{number}_{name}.weight": matrix for number, pair in self.adapter.layers.items()
                                for name, matrix in zip("kv", pair)})  # fmt: skip
        self.holder = holder.to(self.dtype)
        made = [proj["norm"](proj["proj"](e).reshape(1, -1, self.adapter.cross)) for e in (embeds, embeds * 0)]
        self.cond, self.uncond = (t.to(self.dtype) for t in made)
        return self

    def layer(self, layer, weight: float) -> Callable:
        from comfy.ldm.modules.attention import optimized_attention

        import torch

        number = self.adapter.architecture.file_numbers[layer]
        to_k, to_v = self.holder[f"{number}_k"], self.holder[f"{number}_v"]

        def run(q, k, v, extra):
            sigma = extra["sigmas"].detach().cpu()[0].item()
            out = WATCH.text(optimized_attention, q, k, v, extra["n_heads"])
            if not 0.0 <= sigma <= 1e9 or weight == 0:
                return out
            sides = extra["cond_or_uncond"]
            each = q.shape[0] // len(sides)
            keys = [to_k(t).repeat(each, 1, 1) for t in (self.cond, self.uncond)]
            values = [to_v(t).repeat(each, 1, 1) for t in (self.cond, self.uncond)]
            image = optimized_attention(q, torch.cat([keys[s] for s in sides]), torch.cat([values[s] for s in sides]),
                                        extra["n_heads"])  # fmt: skip
            return out + image * weight

        return run


def injections(adapter, embeds, preset: str, dtype):
    """(ours as a StyleAttention, the usual way's replacements by layer) for a preset, both watched."""
    from styleloom.nodes.host.style.attention import StyleAttention
    from styleloom.weights.unet.presets import choose
    from styleloom.weights.ip_adapter.keys_values import fuse, project

    chosen = choose(adapter.architecture, preset, 1.0, 1.0, False)
    ours = StyleAttention(project(adapter, chosen, {"style": fuse(adapter, embeds, None, "concat")}, dtype=dtype))
    usual = Usual(adapter, dtype).build(embeds)
    return ours, {
        layer: WATCH.around(usual.layer(layer, chosen.get(layer, (0.0,))[0])) for layer in adapter.architecture.layers
    }


def rounds(ways: dict[str, Callable[[], object]], count: int) -> dict[str, dict[str, float]]:
    """Medians in seconds of ways that take turns: what `WATCH` saw added, processor time, clock. The first round does
    not count."""
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(count + 1):
        for name, run in ways.items():
            WATCH.added, cpu, clock = 0.0, time.process_time(), time.perf_counter()
            run()
            taken[name].append((WATCH.added, time.process_time() - cpu, time.perf_counter() - clock))
    return {name: dict(zip(("added_s", "cpu_s", "clock_s"), map(median, zip(*times[1:]))))
            for name, times in taken.items()}  # fmt: skip


def say(**line) -> None:
    print(json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in line.items()}),
          flush=True)  # fmt: skip


def report(case: str, preset: str, medians: dict) -> None:
    """The three ways, and what each adds."""
    for name, times in medians.items():
        say(case=case, preset=preset, way=name, **times)
    say(figure=f"{case}, {preset}: added time, ours / usual",
        value=medians["ours"]["added_s"] / medians["usual"]["added_s"], target=f"<= {TARGETS[preset]}")  # fmt: skip


def layers_case(args, dtype) -> None:
    import torch
    from comfy.ldm.modules.attention import optimized_attention
    from styleloom.weights.unet.architecture import SDXL

    adapter = random_adapter(320, 2048, 1024, SDXL, torch.float32)
    embeds = torch.randn(1, 1024, generator=torch.Generator().manual_seed(1))
    sizes = {2: (4096, 640), 4: (1024, 1280)}
    inputs = {level: [torch.randn(2, n, width, dtype=dtype), *(torch.randn(2, 77, width, dtype=dtype),) * 2]
              for level, (n, width) in sizes.items()}  # fmt: skip
    extra = {"sigmas": torch.tensor([3.0]), "cond_or_uncond": [1, 0], "attn_precision": None}

    def call(options, only=None):
        found = options.get("patches_replace", {}).get("attn2", {})
        for layer in SDXL.layers:
            level = 2 if layer[:2] in LEVEL_2 else 4
            q, k, v = inputs[level]
            given = {**extra, "n_heads": sizes[level][1] // 64}
            if layer in found:
                found[layer](q, k, v, given)
            else:
                optimized_attention(q, k, v, given["n_heads"], attn_precision=None, transformer_options=given)

    for preset in args.presets:
        ours, usual = injections(adapter, embeds, preset, dtype)
        x, t = torch.zeros(2, 4, 128, 128), torch.tensor([3.0])

        @WATCH.without
        def executor(x, t, c_concat, c_crossattn, control, options):
            call(options)

        executor.class_obj = SimpleNamespace(diffusion_model=None)
        report("layers", preset, rounds({
            "nothing": lambda: call({}),
            "ours": lambda: ours.apply_model(executor, x, t, transformer_options=dict(extra)),
            "usual": lambda: call({"patches_replace": {"attn2": usual}}),
        }, args.rounds))  # fmt: skip


def unet_case(args, dtype, case: str, channels: int, depth: tuple[int, int], cross: int, side: int) -> None:
    from dataclasses import replace

    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import torch
    from styleloom.weights.unet.architecture import SDXL

    outer, inner = depth
    config = comfy.supported_models.SDXL({
        "use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
        "in_channels": 4, "model_channels": channels, "use_temporal_attention": False, "use_temporal_resblock": False,
        "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, outer, outer, inner, inner], "channel_mult": [1, 2, 4],
        "transformer_depth_middle": inner, "use_linear_in_transformer": True, "context_dim": cross,
        "num_head_channels": min(64, channels), "transformer_depth_output": [0, 0, 0] + [outer] * 3 + [inner] * 3,
    })  # fmt: skip
    config.set_inference_dtype(dtype, None)
    model = comfy.model_base.SDXL(config)
    for parameter in model.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5) if parameter.ndim > 1 else parameter.fill_(1.0)
    patcher = comfy.model_patcher.CoreModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    shape = replace(SDXL, depths=(0, outer, inner), middle=inner)
    adapter = random_adapter(channels, cross, 1024, shape, torch.float32)
    embeds = torch.randn(1, 1024, generator=torch.Generator().manual_seed(1))
    x, sigma = torch.randn(2, 4, side, side), torch.full((2,), 3.0)
    given = {"c_crossattn": torch.randn(2, 77, cross), "y": torch.randn(2, 2816)}

    def call(clone):
        options = {**clone.model_options["transformer_options"], "cond_or_uncond": [1, 0], "sigmas": sigma,
                   "wrappers": clone.wrappers}  # fmt: skip
        return lambda: model.apply_model(x, sigma, transformer_options=options, **given)

    for preset in args.presets:
        ours, usual = injections(adapter, embeds, preset, dtype)
        installed = ours.install(patcher)
        # Innermost: what runs inside our wrapper is the UNet.
        installed.add_wrapper_with_key("apply_model", "watch", WATCH.without(lambda run, *args, **kw: run(*args, **kw)))
        patched = patcher.clone()
        for layer, run in usual.items():
            patched.set_model_attn2_replace(run, *layer)
        ways = {"nothing": call(patcher.clone()), "ours": call(installed), "usual": call(patched)}
        differ = (ways["ours"]() - ways["usual"]()).abs().max() / (ways["ours"]() - ways["nothing"]()).abs().max()
        say(case=case, preset=preset, cross_attentions=len(usual), ours_and_usual_differ_by=float(differ))
        report(case, preset, rounds(ways, max(2, args.rounds // (4 if case == "widths" else 1))))


def prepare_case(args, dtype) -> None:
    import torch
    from styleloom.weights.unet.architecture import SDXL
    from styleloom.weights.unet.presets import choose
    from styleloom.weights.ip_adapter.keys_values import fuse, project

    adapter = random_adapter(320, 2048, 1024, SDXL, torch.float16)
    embeds = torch.randn(1, 1024, generator=torch.Generator().manual_seed(1))

    seeds = iter(range(2, 10**6))

    def ours(preset, weight=1.0, new=True):
        seen = torch.randn(1, 1024, generator=torch.Generator().manual_seed(next(seeds))) if new else embeds
        return project(adapter, choose(SDXL, preset, weight, 1.0, False),
                       {"style": fuse(adapter, seen, None, "concat")}, dtype=torch.bfloat16)  # fmt: skip

    medians = rounds({"ours style": lambda: ours("style"), "ours all": lambda: ours("all"),
                      "ours all, seen before": lambda: ours("all", 0.5, new=False),
                      "usual": lambda: Usual(adapter, torch.float16).build(embeds)}, max(3, args.rounds // 4))  # fmt: skip
    for name, times in medians.items():
        say(case="prepare", way=name, cpu_s=times["cpu_s"], clock_s=times["clock_s"])
    for preset in PRESETS:
        for clock in ("cpu_s", "clock_s"):
            say(figure=f"prepare a new reference, {preset}: usual / ours ({clock[:-2]})",
                value=medians["usual"][clock] / medians[f"ours {preset}"][clock],
                target=f">= {PREPARE_TARGETS[preset]}")  # fmt: skip
    sixteen = random_adapter(320, 2048, 1024, SDXL, torch.float16, tokens=16)
    kept = project(sixteen, choose(SDXL, "all", 1.0, 1.0, False), {"style": fuse(sixteen, embeds, None, "concat")},
                   dtype=torch.bfloat16)  # fmt: skip
    size = sum(t.untyped_storage().nbytes() for pair in kept.values() for t in pair)
    say(figure="memory after preparation, 70 layers, 16 tokens, bf16 (MB)", value=size / 1e6, target="<= 12")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default=os.environ.get("STYLELOOM_HOST"), help="the ComfyUI folder")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--attention", choices=list(ATTENTIONS), default="torch", help="the host's")
    parser.add_argument("--cases", nargs="+", default=["layers", "graph", "widths", "prepare"])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    args = parser.parse_args()
    if not args.host:
        parser.error("name the ComfyUI folder with --host or STYLELOOM_HOST")
    start_host(args.host, args.threads, args.attention)
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    say(**machine(), torch=torch.__version__, threads=args.threads, attention=args.attention, dtype=args.dtype, load=os.getloadavg()[0])
    with torch.inference_mode():
        if "layers" in args.cases:
            layers_case(args, dtype)
        if "graph" in args.cases:
            unet_case(args, dtype, "graph", 32, (2, 10), 2048, 64)
        if "widths" in args.cases:
            unet_case(args, dtype, "widths", 320, (1, 1), 2048, 64)
        if "prepare" in args.cases:
            prepare_case(args, dtype)
    say(load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
