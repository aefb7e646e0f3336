"""One sampling run with two LoRA states: terms in the model's layers, and the side of guidance of each row."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP, add_wrapper_with_key

from ....weights.errors import StyleLoomError
from ....weights.row_adapters.forward import LayersWithTerms, ModelCall
from ....weights.row_adapters.layouts import layouts_of
from ....weights.row_adapters.low_rank import Observer, SharedInput
from ....weights.row_adapters.rows import NEGATIVE, POSITIVE, UnknownRows
from ..areas import note_areas
from ..batch_rows import noting, rows_of
from ..batch_sides import BatchSides
from ..fused_layers import called as calls_layers
from ..lora_patches import find_module
from ..missing_keys import some
from ..repeated_rows import tracing
from ..row_terms import outside_memory_graph, parts_of
from .changed_weights import ChangedWeights
from .model_layouts import Unlisted, order_in_layers, split_points
from .plan import Plan
from .regions import RegionalRun

KEY = "styleloom_branches"


class LayersNotRun(Exception):
    """Layers with terms that the model computes without calling them; raised after the first pass."""

    def __init__(self, names: list[str]):
        super().__init__(f"{len(names)} layers were not called")
        self.names = names


class BranchRun:
    """Puts a plan to work for one sampling run and takes it away again.

    Args:
        plan: From `make_plan`.

    Attributes:
        sides: To be told of the guider's conditionings.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self.sides = BatchSides()
        self._calls: dict[int, ModelCall] = {}
        self._changed: dict[int, ChangedWeights] = {}
        self._shared: list[SharedInput] = []
        self._apart = bool(plan.changes)
        self._observed = False
        self._prepared: set[str] = set()
        self._unlisted = Unlisted()
        self._regions = RegionalRun(plan.regions) if plan.regions.any else None
        self._mixed = False  # the last call of guidance had a batch with both sides
        self._steps = {True: 0, False: 0}  # calls of guidance with both sides: in one batch or not

    @contextlib.contextmanager
    def active(self, patchers: list, model_options: dict):
        """While open: the models' layers know the plan's terms, and `model_options` the two wrappers that say when.

        Args:
            patchers: The host's ModelPatcher of each device in use, loaded.
            model_options: Of this run alone; the wrappers stay in it.
        """
        for schedule in (schedule for made in self._plan.schedules.values() for schedule in made):
            schedule.reset()
            schedule.initialize_timesteps(patchers[0].model)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._apply_model, model_options, is_model_options=True)
        add_wrapper_with_key(
            WrappersMP.CALC_COND_BATCH, KEY, self._calc_cond_batch, model_options, is_model_options=True
        )
        with contextlib.ExitStack() as stack:
            for patcher in patchers:
                stack.enter_context(self._injected(patcher))
            try:
                yield self
                self._tell()
            finally:
                for shared in self._shared:
                    shared.undo()
                self._shared.clear()
                self._calls.clear()
                self._changed.clear()
                if self._regions is not None:
                    self._regions.forget()

    def _tell(self) -> None:
        """What sampling has shown, for the report."""
        together, alone = self._steps[True], self._steps[False]
        if together:
            line = f"sampled with both sides in one batch, in {together} of {together + alone} evaluations"
            self._plan.tell(line, logging.INFO)
        elif alone and not (self._apart or any(self._plan.hooks.values())):
            self._plan.tell(
                "sampled with the sides one after the other: ComfyUI does so where memory is short, where the prompts "
                "cannot be put side by side (Z-Image and others: if one is longer), and for models that take one "
                "picture at a time",
                logging.INFO,
            )

    @contextlib.contextmanager
    def _injected(self, patcher):
        """As one of the host's injections, which it takes out and puts back when hooks change weights in between."""
        layouts = layouts_of(patcher.model.diffusion_model)
        call = self._calls[id(patcher.model)] = ModelCall(layouts)
        layers = LayersWithTerms(
            lambda name: find_module(patcher.model, name),
            self._plan.terms,
            call,
            split_points(patcher.model, layouts, self._plan.terms),
        )
        patcher.set_injections(KEY, [PatcherInjection(lambda _: layers.put_in(), lambda _: layers.take_out())])
        others = patcher.is_injected
        changed = self._changed[id(patcher.model)] = ChangedWeights(patcher.model, self._plan.changes, call)
        with calls_layers(layers.wanted()), changed.put_in():
            try:
                layers.put_in()
                patcher.is_injected = True
                yield
            finally:
                layers.take_out()
                patcher.remove_injections(KEY)
                patcher.is_injected = others

    @contextlib.contextmanager
    def preparing(self, model, sigmas: torch.Tensor):
        """While open: layers that the host runs to prepare a conditioning have the terms of its side, at the strength
        of the first sigma. (Anima, LTX-2 and MiniMax-H3 run a part of the model on the prompt, once.)

        Args:
            model: The BaseModel of the run.
            sigmas: Of the run.
        """
        call, inner, before = self._calls[id(model)], model.extra_conds, model.__dict__.get("extra_conds")
        strengths = self._strengths(sigmas[:1], {"sample_sigmas": sigmas}) if len(sigmas) else {}
        acting = tuple(side for side, each in strengths.items() if any(each))

        def extra_conds(**kwargs):
            call.set_rows((self.sides.of_conditioning(kwargs),), 1, strengths, acting)
            call.active, call.called = True, self._prepared
            try:
                return inner(**kwargs)
            finally:
                call.active, call.called = False, None

        model.extra_conds = extra_conds
        refused = [
            find_module(model, name).register_forward_pre_hook(self._refuses(name))
            for name in self._hooked_layers(model)
        ]
        try:
            yield
        finally:
            for handle in refused:
                handle.remove()
            if before is None:
                del model.extra_conds
            else:
                model.extra_conds = before
        if self._prepared:
            self._plan.tell(
                f"  {len(self._prepared)} layers of the LoRAs run once, while the prompts are prepared, with the LoRAs "
                f"of the prompt's side as strong as they are in the first step: {some(sorted(self._prepared))}",
                logging.INFO,
            )

    def _hooked_layers(self, model) -> set[str]:
        groups = [group for group in self._plan.hooks.values() if group is not None]
        targets = [target for group in groups for hook in group.hooks for target in hook.weights]
        names = {parts_of(target)[0].rpartition(".")[0] for target in targets}
        return {name for name in names if find_module(model, name) is not None}

    @staticmethod
    def _refuses(name: str):
        def stop(*_):
            raise StyleLoomError(
                f"{name} runs while the prompts are prepared, and its patch needs ComfyUI's weight hooks, which act in "
                "sampling only",
                "a patch of a kind that runs in one pass there (LoRA, LoHa, LoKr, OFT or a difference)",
                "Take this layer out of the LoRA, or apply the LoRA to the model with Apply LoRA, for both sides.",
            )

        return stop

    def _calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """Once a layer was met whose rows cannot be told apart, every branch gets a batch of its own."""
        model_options = noting(x_in, model_options)
        if self._regions is not None:
            note_areas(model_options["transformer_options"], conds, tuple(x_in.shape[2:]))
        if sum(cond is not None for cond in conds) < 2:
            return executor(model, conds, x_in, timestep, model_options)
        self._mixed = False
        try:
            if not self._apart:
                try:
                    return executor(model, conds, x_in, timestep, model_options)
                except UnknownRows as unknown:
                    self._apart, self._mixed = True, False
                    self._plan.tell(
                        f"sampled with the sides one after the other, which gives the same picture in more time: a "
                        f"layer of {type(model).__name__} got {unknown}"
                    )
            alone = [
                executor(model, [c if i == j else None for i, c in enumerate(conds)], x_in, timestep, model_options)
                for j in range(len(conds))
            ]
            return [outputs[j] for j, outputs in enumerate(alone)]
        finally:
            self._steps[self._mixed] += 1

    def _apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        options = transformer_options or {}
        call = self._calls.get(id(executor.class_obj))
        if call is None or call.active:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        given = {"c_concat": c_concat, "c_crossattn": c_crossattn, **kwargs}
        inner = executor.class_obj.diffusion_model
        listed = layouts_of(inner)
        rows = rows_of(self.sides, options, x.shape[0], given)
        order = order_in_layers(rows, listed, given, x.shape[0], len(options.get("cond_or_uncond") or [0]))
        if not listed.known and len(order) > 1:
            whole = (x, t, c_concat, c_crossattn, control, options, kwargs)
            self._unlisted.find(executor, call, order, whole, type(inner).__name__)
        strengths = self._strengths(t, options)
        mixed = len(set(order)) > 1
        self._mixed = self._mixed or mixed
        if self._plan.changes and mixed:
            raise StyleLoomError(
                "another node runs both sides in one call of the model, and some weights here have to be different for "
                "each side",
                "a LoRA that needs no changed weights (the report names those that do), or a model without quantised "
                "layers",
                "Leave the other node out, or load the model in fp16, bf16 or fp8.",
            )
        options = tracing(options, inner, call.repeat)
        call.set_rows(
            order,
            x.shape[0],
            strengths,
            tuple(branch for branch, each in strengths.items() if any(each)),
        )
        if self._regions is not None:
            call.places = self._regions.places(executor.class_obj, x, options, rows, {**given, "context": c_crossattn})
        if not self._observed:
            call.observers, call.called = {POSITIVE: Observer(), NEGATIVE: Observer()}, set()
        call.active = True
        try:
            with self._changed[id(executor.class_obj)].exchanged():
                result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            call.active = False
            observers, call.observers = call.observers, None
            called, call.called = call.called, None
            for shared in self._shared:
                shared.let_go()
        if observers is not None:
            self._learn(observers, called)
        return result

    def _learn(self, observers: Mapping[int, Observer], called: set[str]) -> None:
        """After the first pass: which layers share an input, and which were not called by the model."""
        self._observed = True
        idle = self._plan.terms.keys() - called - self._prepared
        # None called at all: the whole model is compiled, and nothing was seen. Norms are then the one uncertain thing.
        apart = sorted(name for name in idle & self._plan.patches.keys() if called or name in self._plan.norms)
        if apart:
            raise LayersNotRun(apart)
        if idle and called:
            self._plan.tell(
                f"  {len(idle)} layers of the LoRAs were not called in the first step, so that nothing acts there "
                f"unless a later step calls them: {some(sorted(idle))}",
                logging.INFO,
            )
        with outside_memory_graph():
            for observer in observers.values():
                self._shared.extend(observer.groups())

    def _strengths(self, t: torch.Tensor, options: Mapping) -> dict[int, tuple[float, ...]]:
        made = {}
        for branch, schedules in self._plan.schedules.items():
            if all(schedule.constant for schedule in schedules):
                made[branch] = tuple(self._plan.strengths[branch])
                continue
            sigma = options.get("sigmas", t)[0]
            for schedule in schedules:
                schedule.prepare_current_keyframe(sigma, options)
            made[branch] = tuple(
                strength * schedule.strength
                for strength, schedule in zip(self._plan.strengths[branch], schedules, strict=True)
            )
        return made
