"""One sampling run with two LoRA states: terms in the model's layers, and the side of guidance of each row."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping

import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP, add_wrapper_with_key

from ....weights.row_adapters.forward import LayersWithTerms, ModelCall
from ....weights.row_adapters.layouts import Layouts, Split, layouts_of
from ....weights.row_adapters.low_rank import Observer, SharedInput
from ....weights.row_adapters.probe import Seen, changed, layouts_found
from ....weights.row_adapters.rows import NEGATIVE, POSITIVE, UnknownRows
from ..batch_rows import noting, rows_of
from ..batch_sides import BatchSides
from ..repeated_rows import tracing
from ..lora_patches import find_module, some
from .plan import Plan

KEY = "styleloom_branches"
_NET = "diffusion_model"
_OURS = "styleloom_"


class NormsNotRun(Exception):
    """Norms whose layers the model does not call; raised after the first pass."""

    def __init__(self, names: list[str]):
        super().__init__(f"{len(names)} norms were not called")
        self.names = names


def split_points(model, layouts: Layouts, names: Iterable[str]) -> list[tuple[str, Split]]:
    """The parts of a model that have to be run for each side alone, of those that have one of the layers `names`.

    Args:
        model: The host's BaseModel.
        layouts: Of its net.
    """
    found = []
    for split in layouts.splits:
        for name, _ in model.diffusion_model.named_modules():
            whole = f"{_NET}.{name}" if name else _NET
            if (name == split.module if not split.module else re.search(split.module, name)) and any(
                layer.startswith(f"{whole}.") for layer in names
            ):
                found.append((whole, split))
    return found


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
        self._shared: list[SharedInput] = []
        self._apart = False
        self._observed = False
        self._prepared: set[str] = set()
        self._unlisted: set[int] = set()
        self._found: dict[tuple, Layouts] = {}

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
                self._calls.clear()

    @contextlib.contextmanager
    def _injected(self, patcher):
        """As one of the host's injections, which it takes out and puts back when hooks change weights in between."""
        layouts = layouts_of(patcher.model.diffusion_model)
        call = self._calls[id(patcher.model)] = ModelCall(layouts)
        if not layouts.known:
            self._unlisted.add(id(patcher.model))
        layers = LayersWithTerms(
            lambda name: find_module(patcher.model, name),
            self._plan.terms,
            call,
            split_points(patcher.model, layouts, self._plan.terms),
        )
        patcher.set_injections(KEY, [PatcherInjection(lambda _: layers.put_in(), lambda _: layers.take_out())])
        others = patcher.is_injected
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
        try:
            yield
        finally:
            if before is None:
                del model.extra_conds
            else:
                model.extra_conds = before
            if self._prepared:
                logging.info(
                    "StyleLoom: Asymmetric CFG: %d of the LoRAs' layers prepare the prompts, each with the LoRAs of its "
                    "side: %s",
                    len(self._prepared),
                    some(sorted(self._prepared)),
                )

    def _calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """Once a layer was met whose rows cannot be told apart, every branch gets a batch of its own."""
        model_options = noting(x_in, model_options)
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
        call = self._calls.get(id(executor.class_obj))
        if call is None or call.active:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        given = {"c_concat": c_concat, "c_crossattn": c_crossattn, **kwargs}
        order = self._order(options, x.shape[0], given, call.layouts)
        if id(executor.class_obj) in self._unlisted and len(order) > 1:
            self._find_layouts(executor, call, order, (x, t, c_concat, c_crossattn, control, options, kwargs))
        strengths = self._strengths(t, options)
        options = tracing(options, executor.class_obj.diffusion_model, call.repeat)
        call.set_rows(
            order,
            x.shape[0],
            strengths,
            tuple(branch for branch, each in strengths.items() if any(each)),
        )
        if not self._observed:
            call.observers, call.called = {POSITIVE: Observer(), NEGATIVE: Observer()}, set()
        call.active = True
        try:
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

    def _order(self, options: Mapping, batch: int, given: Mapping, layouts: Layouts) -> tuple[int, ...]:
        """The side of each run of rows, as the model's layers get them."""
        rows = rows_of(self.sides, options, batch, given)
        if rows is not None and len(set(rows.sides)) == 1:
            return rows.sides[:1]
        mixed = rows is None or any(given.get(name) is not None for name in layouts.apart)
        if mixed or layouts.swaps and not (rows.plain and len(rows.sides) == 2):
            raise UnknownRows(batch, len(options.get("cond_or_uncond") or [0]))
        return rows.sides[::-1] if layouts.swaps else rows.sides

    def _find_layouts(self, executor, call: ModelCall, order: tuple[int, ...], given: tuple) -> None:
        """A class of models that the table does not know: see `probe.py`.

        Raises:
            UnknownRows: a layer stays unknown, or the model cannot be run once more in between: what other nodes have
                put on it may count the calls, and a control's tensors are used up by one.
        """
        x, _, _, _, control, options, _ = given
        batch, key = x.shape[0], (x.shape, order)
        if key in self._found:
            if call.layouts is not self._found[key]:
                call.layouts = self._found[key]
                call.forget()
            return
        others = [name for kind in (options.get("wrappers") or {}).values() for name in kind if not str(name).startswith(_OURS)]
        if control is not None or others or options.get("patches") or options.get("patches_replace"):
            raise UnknownRows(batch, batch, f"{type(executor.class_obj.diffusion_model).__name__}, with other nodes on it")
        seen = {}
        try:
            for branch in (None, POSITIVE, NEGATIVE):
                call.seen = seen[branch] = Seen()
                x, t, c_concat, c_crossattn, _, _, kwargs = given
                x, t, c_concat, c_crossattn = (
                    changed(value, order, batch, branch) for value in (x, t, c_concat, c_crossattn)
                )
                kwargs = {name: changed(value, order, batch, branch) for name, value in kwargs.items()}
                executor(x, t, c_concat, c_crossattn, None, dict(options), **kwargs)
        finally:
            call.seen = None
        call.layouts = self._found[key] = layouts_found(seen, order, batch)
        call.forget()
        logging.info(
            "StyleLoom: Asymmetric CFG: %s is not in the table of models; three more calls of it have shown that both "
            "sides can run in one batch",
            type(executor.class_obj.diffusion_model).__name__,
        )

    def _learn(self, observers: Mapping[int, Observer], called: set[str]) -> None:
        """After the first pass: which layers share an input, and which were not called by the model."""
        self._observed = True
        idle = self._plan.terms.keys() - called - self._prepared
        norms = sorted(idle & self._plan.norms.keys())
        if norms:
            raise NormsNotRun(norms)
        if idle and called:  # none at all: the whole model is compiled, and nothing was seen
            logging.info(
                "StyleLoom: the model does not use %d of the LoRA's layers here: %s", len(idle), some(sorted(idle))
            )
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
