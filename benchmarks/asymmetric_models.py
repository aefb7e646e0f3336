"""Asymmetric CFG on every class of diffusion model that ComfyUI knows: how far from the truth, and in how many calls.

    python benchmarks/asymmetric_models.py                    # all of them, a few minutes on a CPU
    python benchmarks/asymmetric_models.py krea pixart        # those whose name has one of the words
    python benchmarks/asymmetric_models.py --write benchmarks/asymmetric_models.md

Each model is made at a tiny width with seeded weights. Both sides get a LoRA on every layer. The truth: two models that
share nothing, one with the positive LoRA merged by ComfyUI and one with the negative, each sampled alone, and guidance
formed from both results by hand. The error is relative, in the norm of the result. Each model runs two steps; calls are
calls of the model for one step of both sides, once it is known how they can be run.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent)]
from _host import start
from _small_models import PICTURES, conditioning, made
from _small_video import OTHERS

CFG, EXACT = 3.0, 1e-5


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="words of the names of models; none: all")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    parser.add_argument("--unlisted", action="store_true", help="as if no class were in the table: all by running them")
    parser.add_argument("--traceback", action="store_true", help="show where a model failed")
    return parser.parse_args()


def lora_for(model, seed: int, only: str) -> dict[str, torch.Tensor]:
    """Rank 2 on every linear layer and convolution, about a third of the size of its weight."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, module in model.diffusion_model.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            continue
        if not re.search(only, name):
            continue
        weight = module.weight
        if not weight.numel():
            continue
        flat = weight.reshape(weight.shape[0], -1)
        down = torch.randn(2, flat.shape[1], generator=generator).reshape(2, *weight.shape[1:])
        up = torch.randn(weight.shape[0], 2, generator=generator)
        size = 0.3 * float(weight.float().norm()) / float((up @ down.reshape(2, -1)).norm())
        made[f"diffusion_model.{name}.lora_down.weight"] = down
        made[f"diffusion_model.{name}.lora_up.weight"] = up.reshape(*up.shape, *(1 for _ in weight.shape[2:])) * size
    return made


def patcher(model):
    import comfy.model_management
    import comfy.model_patcher

    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def counted(model) -> tuple:
    """(a clone that counts its calls, the counts by sigma)."""
    from comfy.patcher_extension import WrappersMP

    model, calls = model.clone(), []

    def note(executor, x, t, *args, **kwargs):
        calls.append(float(t.flatten()[0]))
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "styleloom_counted", note)
    return model, calls


def sampled(guider, variant, sigmas):
    import comfy.nested_tensor
    import comfy.samplers

    generator = torch.Generator().manual_seed(7)
    shapes = variant.latent if isinstance(variant.latent, list) else [variant.latent]
    noise = [torch.randn(variant.batch, *shape, generator=generator) for shape in shapes]
    latent = [torch.randn(variant.batch, *shape, generator=generator) * 0.5 for shape in shapes]
    mask = None
    if variant.mask:
        mask = torch.ones(variant.batch, 1, *variant.latent[1:])
        mask[:, :, 0] = 0.0
    if isinstance(variant.latent, list):
        noise, latent = (comfy.nested_tensor.NestedTensor(tensors) for tensors in (noise, latent))
    else:
        noise, latent = noise[0], latent[0]
    made = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, denoise_mask=mask, seed=3,
                         disable_pbar=True)  # fmt: skip
    tensors = made.unbind() if getattr(made, "is_nested", False) else [made]
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def compare(variant, nodes) -> dict:
    import comfy.sd
    import comfy.samplers

    began = time.perf_counter()
    base = made(variant)
    positive, negative = conditioning(variant, 11), conditioning(variant, 22)
    loras = lora_for(base, 1, variant.only), lora_for(base, 2, variant.only)
    alone = [made(variant) for _ in loras]
    model, calls = counted(patcher(base))
    sampling = base.model_sampling
    sigmas = torch.tensor([float(sampling.percent_to_sigma(share)) for share in (0.3, 0.5, 0.7)])
    got = nodes["StyleLoomAsymmetricCFGGuider"].execute(
        model=model, positive=positive, negative=negative, cfg=CFG, positive_lora=loras[0], negative_lora=loras[1]
    )
    guider, report = got.args
    ours = sampled(guider, variant, sigmas)
    last = Counter(calls)[calls[-1]]
    sides = {}
    for name, lora, conds, each in zip(("positive", "negative"), loras, (positive, negative), alone, strict=True):
        merged = comfy.sd.load_lora_for_models(patcher(each), None, lora, 1.0, 1.0)[0]
        sides[name] = (merged, conds)
    truth = two_models(sides, variant, sigmas)
    error = float((ours - truth).norm() / truth.norm())
    symmetric = comfy.samplers.CFGGuider(sides["positive"][0])
    symmetric.set_conds(positive, negative)
    symmetric.set_cfg(CFG)
    both = float((sampled(symmetric, variant, sigmas) - truth).norm() / truth.norm())
    return {
        "error": error,
        "calls": last,
        "symmetric": both,
        "hooked": "weight hooks" in report,
        "layers": len(loras[0]) // 2,
        "seconds": time.perf_counter() - began,
    }


def two_models(sides, variant, sigmas):
    """Guidance formed by hand, in each step, from two models that share nothing."""
    import comfy.model_management
    import comfy.samplers
    from comfy.patcher_extension import WrappersMP

    (first, positive), (second, negative) = sides["positive"], sides["negative"]
    other = comfy.samplers.CFGGuider(second)
    other.set_conds(negative, negative)
    prepared = {}

    def prepare(executor, guider, *args, **kwargs):
        """The negative's conditioning as the negative's own model prepares it."""
        return executor(guider, *args, **kwargs)

    def inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed,
                     latent_shapes=None):
        if latent_image is not None and torch.count_nonzero(latent_image) > 0:
            latent_image = second.model.process_latent_in(latent_image)
        prepared.update(comfy.samplers.process_conds(second.model, noise, other.conds, device, latent_image,
                                                     denoise_mask, seed, latent_shapes=latent_shapes))
        return noise

    other.inner_sample = inner_sample
    model = first.clone()

    def route(executor, inner, conds, x, timestep, options):
        good = executor(inner, [conds[0]], x, timestep, options)[0]
        bad = executor(second.model, [prepared["negative"]], x, timestep, options)[0]
        return [good, bad]

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "route", route)
    sampled(other, variant, sigmas)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(CFG)
    comfy.model_management.load_models_gpu([second])
    second.pre_run()
    return sampled(guider, variant, sigmas)


def main() -> None:
    options = parse()
    nodes = start("cpu")
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    words = [word.lower() for word in options.names]
    chosen = [v for v in (*PICTURES, *OTHERS) if not words or any(word in v.name.lower() for word in words)]
    if options.unlisted:
        for name, module in list(sys.modules.items()):
            if name.endswith("weights.row_adapters.layouts"):
                module._TABLE = {}
    lines, exact, single = [], 0, 0
    for variant in chosen:
        try:
            with torch.inference_mode():
                found = compare(variant, nodes)
        except Exception as error:
            if options.traceback:
                traceback.print_exc()
            said = " ".join(str(error).split())[:90]
            lines.append(f"| {variant.name} | - | - | - | {type(error).__name__}: {said} |")
            print(lines[-1], flush=True)
            continue
        right = found["error"] <= EXACT
        exact += right
        single += right and found["calls"] == 1
        note = "weight hooks" if found["hooked"] else ""
        if not right:
            note = "**not exact** " + note
        lines.append(
            f"| {variant.name} | {found['error']:.1e} | {found['symmetric']:.2f} | {found['calls']} | {note} |"
        )
        print(lines[-1], f"{found['seconds']:.1f} s", flush=True)
    total = f"{len(chosen)} variants: {exact} exact (error at most {EXACT:g}), {single} of them in one call."
    print(total)
    if options.write:
        options.write.write_text(page(lines, total), encoding="utf-8")


def page(lines: list[str], total: str) -> str:
    head = (
        "# Asymmetric CFG on the models that ComfyUI knows\n\n"
        "Made by `python benchmarks/asymmetric_models.py --write benchmarks/asymmetric_models.md`. Each model is made at "
        "a tiny width with seeded weights; both sides have a LoRA on every layer. *Error* is the distance to two models "
        "that share nothing, each with its own LoRA merged by ComfyUI, relative to the size of the result. *Symmetric* "
        "is the same distance of plain CFG with the positive LoRA on both sides. *Calls* is the number of calls of the "
        "model for one step of both sides.\n\n"
    )
    table = ["| Model | Error | Symmetric | Calls | |", "| --- | --- | --- | --- | --- |", *lines]
    return head + total + "\n\n" + "\n".join(table) + "\n"


if __name__ == "__main__":
    main()
