"""One sampling run with two LoRA states: terms before the layers' forward, and the branch of each row."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping

import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP, add_wrapper_with_key

from ....weights.row_adapters.low_rank import LowRankTerm, Observer, SharedInput
from ....weights.row_adapters.rows import NEGATIVE, POSITIVE, TILED, UnknownRows, spans
from .plan import Plan
from ..lora_patches import find_module, some

KEY = "styleloom_branches"


class NormsNotRun(Exception):
    """Norms whose layers the model does not call; raised after the first pass."""

    def __init__(self, names: list[str]):
        super().__init__(f"{len(names)} norms were not called")
        self.names = names


class Pass:
    """What the layers have to know during one call of one model: plain numbers, so that a compiled graph can rely on
    them from call to call. Outside of such a call every layer does just what it did before."""

    def __init__(self):
        self.on = False
        self.order: tuple[int, ...] = ()
        self.batch = 0
        self.tiled = False
        self.strengths: dict[int, tuple[float, ...]] = {}
        self.observers: dict[int, Observer] | None = None
        self.called: set[str] | None = None
        self.found: dict[int, tuple] = {}

    def runs(self, rows: int) -> tuple:
        """Runs of rows of the branches that act in this pass, worked out once for each number of rows."""
        found = self.found.get(rows)
        if found is None:
            found = self.found[rows] = tuple(
                run for run in spans(self.order, self.batch, rows, self.tiled) if any(self.strengths[run[0]])
            )
        return found


def branched_forward(name: str, forward: Callable, terms: Mapping[int, list], now: Pass) -> Callable:
    """A layer's forward that also applies each branch's terms to the rows of that branch."""

    only = {branch: made[0] for branch, made in terms.items() if len(made) == 1 and isinstance(made[0], LowRankTerm)}
    simple = len(only) == len(terms)

    def run(x, *args, **kwargs):
        if not now.on:
            return forward(x, *args, **kwargs)
        # Nearly every layer, in every pass but the first.
        if simple and now.called is None and not torch.compiler.is_compiling():
            runs = now.runs(x.shape[0])
            y = forward(x, *args, **kwargs)
            for branch, start, length in runs:
                term = only.get(branch)
                if term is not None:
                    term.add(x, x.narrow(0, start, length), y.narrow(0, start, length), now.strengths[branch])
            return y
        watched = now.called is not None and not torch.compiler.is_compiling()
        if watched:
            now.called.add(name)
        runs = tuple(
            run
            for run in spans(now.order, now.batch, x.shape[0], now.tiled)
            if run[0] in terms and any(now.strengths[run[0]])
        )
        if not runs:
            return forward(x, *args, **kwargs)

        def base(value):
            return forward(value, *args, **kwargs)

        # What changes the input does so from the last term to the first: the last was merged last.
        seen, changed = {}, None
        for branch, start, length in runs:
            rows = x.narrow(0, start, length)
            inputs = []
            for term in reversed(terms[branch]):
                inputs.append(rows)
                rows = term.enter(rows, now.strengths[branch])
            seen[start] = inputs[::-1]
            if rows is not inputs[0]:
                changed = x.clone() if changed is None else changed
                changed.narrow(0, start, length).copy_(rows)
        y = base(x if changed is None else changed)
        for branch, start, length in runs:
            out, strengths = y.narrow(0, start, length), now.strengths[branch]
            for term, rows in zip(terms[branch], seen[start], strict=True):
                if isinstance(term, LowRankTerm):
                    if watched and now.observers is not None:
                        now.observers[branch].see(term, x)
                    term.add(x if changed is None else None, rows, out, strengths)
                else:
                    term.leave(rows, out, strengths, base)
        return y

    return run


class BranchRun:
    """Puts a plan to work for one sampling run and takes it away again.

    Args:
        plan: From `make_plan`.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._branch_of: dict[object, int] = {}
        self._passes: dict[int, Pass] = {}
        self._shared: list[SharedInput] = []
        self._apart = False
        self._observed = False

    def know(self, conds: Mapping[int, list[dict]], own: Mapping[object, int]) -> list[tuple[dict, int]]:
        """Learn the ids of both sides' conditionings.

        Args:
            conds: Branch → its conditionings as they are run.
            own: The id of each conditioning as it was given → its branch.

        Returns:
            Those that came over from the other side, each with the branch it now belongs to; they get ids of their own.
        """
        copied = []
        for branch, side in conds.items():
            for cond in side:
                if own.get(cond["uuid"], branch) != branch:
                    cond["uuid"] = uuid.uuid4()
                    copied.append((cond, branch))
                self._branch_of[cond["uuid"]] = branch
        return copied

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
            finally:
                for shared in self._shared:
                    shared.undo()
                self._shared.clear()
                self._passes.clear()

    @contextlib.contextmanager
    def _injected(self, patcher):
        """As one of the host's injections, which it takes out and puts back when hooks change weights in between."""
        now = self._passes[id(patcher.model)] = Pass()
        ours: dict[str, tuple[torch.nn.Module, Callable, Callable | None]] = {}

        def inject(_=None):
            for name, terms in self._plan.terms.items():
                module = find_module(patcher.model, name)
                before, made = module.__dict__.get("forward"), branched_forward(name, module.forward, terms, now)
                ours[name] = (module, made, before)
                module.forward = made

        def eject(_=None):
            for module, made, before in ours.values():
                if module.__dict__.get("forward") is not made:
                    continue  # an injection below this one was taken out first, and this one with it
                if before is None:
                    del module.forward
                else:
                    module.forward = before
            ours.clear()

        patcher.set_injections(KEY, [PatcherInjection(inject, eject)])
        others = patcher.is_injected
        try:
            inject()
            patcher.is_injected = True
            yield
        finally:
            eject()
            patcher.remove_injections(KEY)
            patcher.is_injected = others

    def _calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """Once a layer was met whose rows cannot be told apart, every branch gets a batch of its own."""
        if not self._apart:
            try:
                return executor(model, conds, x_in, timestep, model_options)
            except UnknownRows as unknown:
                self._apart = True
                logging.warning(
                    "StyleLoom: Asymmetric CFG: a layer of %s got %s; both branches now run one after the other, which "
                    "gives the same picture in more time",
                    type(model).__name__,
                    unknown,
                )
        alone = [
            executor(model, [c if i == j else None for i, c in enumerate(conds)], x_in, timestep, model_options)
            for j in range(len(conds))
        ]
        return [outputs[j] for j, outputs in enumerate(alone)]

    def _apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        options = transformer_options or {}
        now = self._passes.get(id(executor.class_obj))
        if now is None or now.on:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        now.found.clear()
        now.order = self._order(options)
        now.batch = x.shape[0]
        now.tiled = type(executor.class_obj.diffusion_model).__name__ in TILED
        now.strengths = self._strengths(t, options)
        if not self._observed:
            now.observers, now.called = {POSITIVE: Observer(), NEGATIVE: Observer()}, set()
        now.on = True
        try:
            result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            now.on = False
            observers, now.observers = now.observers, None
            called, now.called = now.called, None
            for shared in self._shared:
                shared.let_go()
        if observers is not None:
            self._learn(observers, called)
        return result

    def _learn(self, observers: Mapping[int, Observer], called: set[str]) -> None:
        """After the first pass: which layers share an input, and which were not called by the model."""
        self._observed = True
        idle = self._plan.terms.keys() - called
        norms = sorted(idle & self._plan.norms.keys())
        if norms:
            raise NormsNotRun(norms)
        if idle and called:  # none at all: the whole model is compiled, and nothing was seen
            logging.info(
                "StyleLoom: the model does not use %d of the LoRA's layers here: %s", len(idle), some(sorted(idle))
            )
        for observer in observers.values():
            self._shared.extend(observer.groups())

    def _order(self, options: Mapping) -> tuple[int, ...]:
        """By the conditioning that a chunk comes from: nodes that run one side alone (perturbed attention, skipped
        layers, SAG) pass a list of one, so its place says nothing. One that the guider does not know goes by place."""
        places = options.get("cond_or_uncond") or [POSITIVE]
        ids = options.get("uuids") or [None] * len(places)
        return tuple(
            self._branch_of.get(own, POSITIVE if place == 0 else NEGATIVE)
            for place, own in zip(places, ids, strict=True)
        )

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
