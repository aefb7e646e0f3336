#!/usr/bin/env python3
"""Training the masks of a merge: time and memory of a step, against the passes of the model that it cannot do without.

    STYLELOOM_HOST=path/to/ComfyUI python benchmarks/ziprank_train.py [--device cpu|cuda] [--steps N] [--width 32|320]

The host is loaded as the tests load it. --width 32 is the kit's small SDXL (all 700 layers, narrow); 320 is SDXL's own
width with random weights, for a GPU. Prints JSON lines: seconds of a plain forward pass of two rows, of one training step
without and with the Constyle cycle, passes with gradient in a step, the loss at the first and last step, and on a GPU the
peak of its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


def load_host(device: str):
    """The host, the pack and the kit in this process."""
    folder = Path(os.environ["STYLELOOM_HOST"]).resolve()
    base = Path(tempfile.mkdtemp())
    for name in ("models", "input", "output", "user", "temp", "custom_nodes"):
        (base / name).mkdir()
    for name, target in (("styleloom_kit", ROOT / "tests" / "kit"), ("StyleLoom", ROOT)):
        (base / "custom_nodes" / name).symlink_to(target, target_is_directory=True)
    here = str(ROOT / "benchmarks")
    sys.path[:] = [str(folder)] + [p for p in sys.path if p not in (here, str(ROOT), "")]
    sys.argv = ["main.py", "--base-directory", str(base), "--disable-all-custom-nodes"]
    sys.argv += ["--cpu"] if device == "cpu" else []
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    asyncio.run(nodes.init_public_apis())
    loaded = []
    for name in ("styleloom_kit", "StyleLoom"):
        path = str(base / "custom_nodes" / name)
        assert asyncio.run(nodes.load_custom_node(path, module_parent="custom_nodes")), name
        loaded.append(sys.modules[path.replace(".", "_x_")])
    return loaded


def machine() -> dict:
    spec = importlib.util.spec_from_file_location("styleloom_bench", ROOT / "benchmarks" / "_pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=32, choices=[32, 320])
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    args = parser.parse_args()
    kit, pack = load_host(args.device)
    import torch

    diffusion = importlib.import_module(f"{kit.__name__}.diffusion")
    text = importlib.import_module(f"{kit.__name__}.text")
    lora_files = importlib.import_module(f"{kit.__name__}.lora_files")
    work_module = importlib.import_module(f"{pack.__name__}.nodes.host.merge.ziprank_run")
    runs = importlib.import_module(f"{pack.__name__}.nodes.host.merge.model_modes")
    trainer_module = importlib.import_module(f"{pack.__name__}.nodes.host.merge.train_masks")
    progress = importlib.import_module(f"{pack.__name__}.nodes.host.progress")
    from safetensors.torch import load_file

    on_gpu = args.device == "cuda"
    print(json.dumps({"what": "machine", **machine(), "torch": torch.__version__, "load_before": os.getloadavg()[0],
                      "device": torch.cuda.get_device_name() if on_gpu else "cpu"}), flush=True)
    if args.width == 320:
        diffusion._UNET["model_channels"] = 320
    folder = Path(tempfile.mkdtemp())
    loras = [dict(load_file(lora_files.write_sdxl_lora(folder / role, role, 8, width=args.width)))
             for role in ("content", "style")]
    model, clip = diffusion.sdxl_small(0), text.sdxl_text(0)
    passes: list[bool] = []
    stamps: list[float] = []
    predict = trainer_module.Trainer.predict

    def counted(self, *args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return predict(self, *args, **kwargs)

    def finished() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    curve = runs.Curve.__call__

    def stamped(self, losses=()):
        stamps.append(finished())
        return curve(self, losses)

    trainer_module.Trainer.predict, runs.Curve.__call__ = counted, stamped
    for cycle in (0.0, 0.01):
        settings = {"content_strength": 1.0, "style_strength": 1.0, "separation": 0.7, "prior": "soft", "max_rank": 0,
                    "content_prompt": "a cube", "style_prompt": "ink", "steps": args.steps, "learning_rate": 0.01,
                    "cycle_weight": cycle, "seed": 0, "size": args.size, "calibration_steps": 2, "prior_weight": 0.1,
                    "keep_strength": True, "solver": "masks"}
        with torch.inference_mode():
            work = work_module.ZipRank(*loras, model, clip, "train", settings)
            work.prepare(progress.Steps)
            passes.clear()
            stamps.clear()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            work.run()
        marks = [b - a for a, b in zip(stamps, stamps[1:])]
        teachers, steps = marks[: runs.LESSONS - 1], marks[runs.LESSONS :]
        found = {
            "what": "train", "width": args.width, "size": args.size, "cycle_weight": cycle, "steps": args.steps,
            "forward_of_two_rows_s": round(median(teachers), 4), "step_s": round(median(steps), 4),
            "step_over_forward": round(median(steps) / median(teachers), 2),
            "passes_with_gradient_a_step": sum(passes) / args.steps,
            "first_loss": work.losses[0], "last_loss": work.losses[-1], "layers": len(work.prepared.targets),
        }
        if on_gpu:
            found["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
