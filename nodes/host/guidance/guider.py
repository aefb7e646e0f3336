"""Guidance with one LoRA state on the positive side and another on the negative side."""

from __future__ import annotations

import contextlib

import comfy.hooks
import comfy.samplers
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..batch_sides import side_of_list
from ..row_terms import carry
from .plan import Plan
from .run import KEY, BranchRun, LayersNotRun


class AsymmetricCFGGuider(comfy.samplers.CFGGuider):
    """noise = negative + cfg · (positive − negative), each side computed with its own LoRAs, both in one batch.

    Source of the scheme: Duan and Chen, arXiv 2606.13809, section 3.4.

    Args:
        model: MODEL. It stays as it is; LoRAs that it is patched with act on both sides.
        plan: From `make_plan` for this model.

    Attributes:
        plan: The same.
        all_sigmas: Of all steps, where a run is a part of them; None: a run is all.
    """

    def __init__(self, model, plan: Plan):
        super().__init__(model.clone())
        self.plan = plan
        self.all_sigmas = None
        carry(self.model_patcher, KEY, plan.holder())

    @property
    def report(self) -> str:
        """What was made of the LoRAs; after sampling, also what has shown there."""
        return "\n".join(self.plan.report)

    def set_conds(self, positive, negative):
        """positive, negative: CONDITIONING; negative may be None, as with cfg 1."""
        self._given = (positive, negative)
        conds = {"positive": positive} | ({} if negative is None else {"negative": negative})
        for name in conds:
            hooks = self.plan.hooks[side_of_list(name)]
            if hooks is not None:
                conds[name] = comfy.hooks.set_hooks_for_conditioning(conds[name], hooks)
        self.inner_set_conds(conds)

    def sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        if sigmas.shape[-1] > 1:
            self.plan.of_steps(sigmas if self.all_sigmas is None else self.all_sigmas)
        given = (noise, latent_image, sampler, sigmas, *args)
        try:
            return super().sample(*given, **kwargs)
        except LayersNotRun as found:  # known after the first pass, before the first step is done
            self.plan.hook_layers(found.names)
            self.set_conds(*self._given)
            return super().sample(*given, **kwargs)

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, *args, **kwargs):
        others = self.model_options.get("multigpu_clones", {}).values()
        patchers = [self.model_patcher] + [other for other in others if other is not self.model_patcher]
        self.model_options["transformer_options"] = {
            **self.model_options.get("transformer_options", {}),
            **self.plan.options,
        }
        run = BranchRun(self.plan)
        run.sides.given(self.conds)

        preparing = contextlib.ExitStack()

        def told(executor, guider, *inner):
            preparing.close()
            for cond, side in run.sides.prepared(self.conds):
                cond["hooks"] = self._hooks_on(side, cond.get("hooks"))
            return executor(guider, *inner)

        add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, told, self.model_options, is_model_options=True)
        with run.active(patchers, self.model_options), preparing:
            preparing.enter_context(run.preparing(self.inner_model, sigmas))
            return super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)

    def _hooks_on(self, side: int, hooks):
        """Hooks of a conditioning that was copied to a side: the user's stay, the plan's become those of that side."""
        planned = [hook for group in self.plan.hooks.values() if group is not None for hook in group.hooks]
        mine = self.plan.hooks[side]
        made = comfy.hooks.HookGroup()
        for hook in hooks.hooks if hooks is not None else ():
            if hook not in planned:
                made.add(hook)
        for hook in mine.hooks if mine is not None else ():
            made.add(hook)
        return made if len(made) else None
