"""Asymmetric CFG in the real host against the two-pass truth: core's own Dual Model CFG Guider on two separate models,
one with the positive LoRA merged by the host's loader and one with the negative LoRA."""

from __future__ import annotations

import pytest
import torch

ARCHITECTURES = ("sdxl", "sd1.5", "z-image", "qwen-image", "flux2")
LATENTS = {
    "sdxl": (4, 8, 12),
    "sd1.5": (4, 8, 12),
    "z-image": (16, 8, 12),
    "qwen-image": (16, 1, 8, 12),
    "flux2": (128, 4, 6),
}
STEPS, CFG = 2, 3.5


class Bench:
    """One architecture: its model, prompts and latent, and the ways to sample it."""

    def __init__(self, run_node, kit, name):
        self.run, self.kit, self.name = run_node, kit, name
        self.model, self.clip, _ = run_node("StyleLoomKitModel", architecture=name, seed=1)
        self.positive, self.negative = (
            run_node("CLIPTextEncode", clip=self.clip, text=text)[0] for text in ("a red boat", "blurry")
        )

    def latent(self, batch=1):
        return {"samples": torch.zeros(batch, *LATENTS[self.name])}

    def fresh(self):
        """The same model again, sharing nothing."""
        return self.kit.architectures.make(self.name, 1)[0]

    def merged(self, *loras):
        model = self.fresh()
        for lora, strength in loras:
            model = self.run("StyleLoomApplyLoRA", model=model, lora=lora, strength=strength)[0]
        return model

    def through(self, guider, latent=None, seed=5, steps=STEPS, **more):
        noise = self.run("RandomNoise", noise_seed=seed)[0]
        sampler = self.run("KSamplerSelect", sampler_name="euler")[0]
        sigmas = self.run("BasicScheduler", model=self.model, scheduler="simple", steps=steps, denoise=1.0)[0]
        return self.run(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent or self.latent(),
            **more,
        )[0]["samples"]

    def asymmetric(self, model=None, latent=None, positive=None, negative=None, cfg=CFG, **loras):
        guider, report = self.run(
            "StyleLoomAsymmetricCFGGuider",
            model=model or self.model,
            positive=positive or self.positive,
            negative=negative or self.negative,
            cfg=cfg,
            **loras,
        )
        self.report = report
        return self.through(guider, latent)

    def truth(self, positive_loras=(), negative_loras=(), latent=None, positive=None, negative=None, cfg=CFG):
        guider = self.run(
            "DualModelGuider",
            model=self.merged(*positive_loras),
            model_negative=self.merged(*negative_loras),
            positive=positive or self.positive,
            negative=negative or self.negative,
            cfg=cfg,
        )[0]
        return self.through(guider, latent)

    def symmetric(self, *loras, latent=None):
        guider = self.run(
            "CFGGuider", model=self.merged(*loras), positive=self.positive, negative=self.negative, cfg=CFG
        )[0]
        return self.through(guider, latent)


def distance(a, b):
    """Relative, in the norm of the tensor."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def benches(run_node, kit):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Bench(run_node, kit, name)
        return made[name]

    return get


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_two_passes_and_not_the_symmetric_result(name, benches, kit):
    bench = benches(name)
    style = kit.adapters.make(bench.model, "lora", rank=4, seed=1)
    gray = kit.adapters.make(bench.model, "lora", rank=3, alpha=None, seed=2)
    ours = bench.asymmetric(positive_lora=style, negative_lora=gray, positive_strength=0.8, negative_strength=0.5)
    truth = bench.truth([(style, 0.8)], [(gray, 0.5)])
    symmetric = bench.symmetric((style, 0.8))
    print(name, distance(ours, truth), distance(ours, symmetric), bench.report)
    assert distance(ours, truth) < 1e-4
    assert distance(ours, symmetric) > 100 * distance(ours, truth) + 1e-3
