"""The truth about asymmetric guidance: each side on a model of its own, merged by the host, one pass after the other.

Two oracles. `truth` is core's Dual Model CFG Guider on two separate models. `routed` is core's CFG Guider on one model
that hands every negative conditioning to a second model: it also holds where the Dual Model CFG Guider does something
else than plain CFG does (areas of one side, nodes that run extra conditionings).
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

LATENTS = {
    "sdxl": (4, 8, 12),
    "sd1.5": (4, 8, 12),
    "z-image": (16, 8, 12),
    "qwen-image": (16, 1, 8, 12),
    "flux2": (128, 4, 6),
}
STEPS, CFG = 2, 3.5


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, in the norm of the tensor."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def recorded(model) -> tuple:
    """(a clone that notes each call of the model, the notes: one `cond_or_uncond` and the number of rows per call)."""
    model, calls = model.clone(), []

    def note(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        calls.append((tuple(transformer_options["cond_or_uncond"]), x.shape[0]))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note", note)
    return model, calls


class Bench:
    """One architecture: its model, prompts and latent, and the ways to sample it.

    Args:
        run_node: `Host.run`. short: a net of few blocks (`architectures.SHORT`), which is the right one for every test
            that asks nothing of the number of blocks.
    """

    def __init__(self, run_node, kit, name: str, short: bool = True):
        self.run, self.kit, self.name, self.short = run_node, kit, name, short
        self.model = self.fresh()
        self.clip = kit.architectures.ARCHITECTURES[name].clip(1)
        self._prompts: dict[str, list] = {}
        self.positive, self.negative = self.prompt("a red boat"), self.prompt("blurry")
        self.report = ""
        self._bare: dict[str, object] = {}
        self._kept: list = []

    def prompt(self, text: str):
        if text not in self._prompts:
            self._prompts[text] = self.run("CLIPTextEncode", clip=self.clip, text=text)[0]
        return self._prompts[text]

    def latent(self, batch: int = 1) -> dict:
        return {"samples": torch.zeros(batch, *LATENTS[self.name])}

    def lora(self, seed: int = 1, **more) -> dict[str, torch.Tensor]:
        return self.kit.adapters.make(self.model, more.pop("kind", "lora"), seed=seed, **more)

    def fresh(self):
        """The same model again, sharing nothing."""
        return self.kit.architectures.make_model(self.name, 1, self.short)

    def with_loras(self, model, *loras):
        """`model` with (LORA_MODEL, strength), … put on it by the host's merge."""
        for lora, strength in loras:
            model = self.run("StyleLoomApplyLoRA", model=model, lora=lora, strength=strength)[0]
            # The host goes back to the clone that a clone was made from; where that is gone, every load of any model
            # collects garbage through the whole process first, which takes longer than a step.
            self._kept.append(model)
        return model

    def merged(self, *loras, side: str = "positive"):
        """A model with (LORA_MODEL, strength), … merged by the host. Two sides never share one.

        Each side has one model. The host patches it when a clone is loaded, and takes that back bit by bit when it
        loads another clone.
        """
        if side not in self._bare:
            self._bare[side] = self.fresh()
        return self.with_loras(self._bare[side], *loras)

    def sigmas(self, steps: int = STEPS, scheduler: str = "simple") -> torch.Tensor:
        return self.run("BasicScheduler", model=self.model, scheduler=scheduler, steps=steps, denoise=1.0)[0]

    def through(self, guider, latent=None, seed=5, steps=STEPS, sigmas=None, sampler="euler", noise=None, **more):
        return self.run(
            "SamplerCustomAdvanced",
            noise=self.run("RandomNoise", noise_seed=seed)[0] if noise is None else noise,
            guider=guider,
            sampler=self.run("KSamplerSelect", sampler_name=sampler)[0],
            sigmas=self.sigmas(steps) if sigmas is None else sigmas,
            latent_image=latent or self.latent(),
            **more,
        )[0]["samples"]

    def guider(self, model=None, positive=None, negative=None, cfg=CFG, **loras):
        """Ours; its report is in `report`."""
        guider, self.report = self.run(
            "StyleLoomAsymmetricCFGGuider",
            model=model or self.model,
            positive=positive or self.positive,
            negative=negative or self.negative,
            cfg=cfg,
            **loras,
        )
        return guider

    def asymmetric(self, model=None, latent=None, positive=None, negative=None, cfg=CFG, sampling=None, **loras):
        return self.through(self.guider(model, positive, negative, cfg, **loras), latent, **(sampling or {}))

    def truth(self, positive_loras=(), negative_loras=(), latent=None, positive=None, negative=None, cfg=CFG,
              sampling=None, change: Callable = lambda model: model):
        """`change` is done to both models: what a node makes of a model, for instance."""
        models = self.merged(*positive_loras), self.merged(*negative_loras, side="negative")
        return self.two_models(*map(change, models), latent, positive, negative, cfg, sampling)

    def two_models(self, positive_model, negative_model, latent=None, positive=None, negative=None, cfg=CFG,
                   sampling=None):
        """Core's Dual Model CFG Guider on two models that share nothing."""
        guider = self.run("DualModelGuider", model=positive_model, model_negative=negative_model, cfg=cfg,
                          positive=positive or self.positive, negative=negative or self.negative)[0]
        return self.through(guider, latent, **(sampling or {}))

    def plain(self, model=None, latent=None, cfg=CFG, sampling=None):
        """Core's CFG Guider on one model."""
        guider = self.run("CFGGuider", model=model or self.model, positive=self.positive, negative=self.negative,
                          cfg=cfg)[0]
        return self.through(guider, latent, **(sampling or {}))

    def symmetric(self, *loras, latent=None, change: Callable = lambda model: model, cfg=CFG, **more):
        guider = self.run(
            "CFGGuider", model=change(self.merged(*loras)), positive=more.pop("positive", self.positive),
            negative=more.pop("negative", self.negative), cfg=cfg,
        )[0]
        return self.through(guider, latent, **more.pop("sampling", {}))

    def routed(self, positive_loras=(), negative_loras=(), latent=None, positive=None, negative=None, cfg=CFG,
               sampling=None, change: Callable = lambda model: model):
        """Plain CFG on the positive side's model, where each conditioning of the negative side runs on the other's."""
        other = self.merged(*negative_loras, side="negative")
        model = change(self.merged(*positive_loras)).clone()
        guider = comfy.samplers.CFGGuider(model)

        def route(executor, inner, conds, x, timestep, options):
            made = []
            for place, cond in enumerate(conds):
                # An extra pass of a guidance node hands over the side's own list; its place then says nothing.
                second = place == 1 if len(conds) > 1 else cond is guider.conds.get("negative")
                alone = [cond if i == place else None for i in range(len(conds))]
                made.append(executor(other.model if second else inner, alone, x, timestep, options)[place])
            return made

        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "route", route)
        guider.set_conds(positive or self.positive, negative or self.negative)
        guider.set_cfg(cfg)
        comfy.model_management.load_models_gpu([other])  # also takes back what a clone of it had patched
        other.pre_run()
        try:
            return self.through(guider, latent, **(sampling or {}))
        finally:
            other.cleanup()
