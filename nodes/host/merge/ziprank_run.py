"""The course of a ZipRank merge, from two LORA_MODELs to the merged one, its report and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ....weights.errors import StyleLoomError
from ....weights.lora.algebra import cut, frobenius_norm
from ....weights.lora.writing import write_lora, written_dtype
from ....weights.merge import report
from ....weights.merge.alignment import align, all_targets, check_sizes
from ....weights.merge.calibrated import routed, solve_calibrated
from ....weights.merge.fast import merge_fast
from ....weights.merge.one_layer import on_own_inputs
from ....weights.merge.other_parts import folded_line, pass_other
from ....weights.merge.priors import layer_prior
from ....weights.merge.two_loras import assemble, prepare, solve_prepared
from ....weights.parallel import map_single_threaded
from . import heat_map, model_modes
from .settings import MergeSettings
from ..key_maps import model_targets

FAST, CALIBRATED, TRAIN = MODES = ("fast", "calibrated", "train")


class ZipRank:
    """One merge. `prepare`, then `run`; `merged` holds the layers afterwards."""

    def __init__(self, content, style, model, clip, mode: str, settings: MergeSettings | Mapping):
        """`settings`: the other inputs of the node; what is left out has its default."""
        self.tensors, self.model, self.clip, self.mode = (content, style), model, clip, mode
        self.settings = MergeSettings.of(settings)
        self.strengths = self.settings.strengths
        self.losses: list[float] = []
        self.notes: list[str] = []
        if mode != FAST:
            self._check_needs()
        self.known = model_targets(model, clip)
        jobs = []
        for lora, name in zip(self.tensors, ("content_lora", "style_lora")):
            jobs += [partial(self.known.read, lora, name), partial(report.fingerprint, lora)]
        # A hash goes over the whole file without Python's lock, so it runs beside the reading, which holds it.
        with map_single_threaded(lambda job: job(), jobs) as done:
            found = list(done)
        self.loras, self.hashes = found[::2], found[1::2]
        align(self.loras, self.known.weight_shape)
        check_sizes(self.loras, self.known.weight_shape)
        self.family = self.known.family or self.loras[0].family
        self.prior, note = layer_prior(self.settings.prior, self.family, self.settings.custom_prior)
        if note:
            self.notes.append(note)
        for index, lora in enumerate(self.loras):
            absent = sum(self.prior(target)[index] == 0 for target in lora.adapters)
            if absent:
                self.notes.append(
                    f"{lora.label}: left out of {absent} layers, as the prior gives it a weight of 0 there"
                )

    def _check_needs(self) -> None:
        lacking = [name for name in ("model", "clip") if getattr(self, name) is None]
        if lacking:
            raise StyleLoomError(
                f"mode {self.mode} without {' and '.join(lacking)}",
                "the base model and its text encoder",
                "Connect model and clip of the checkpoint that both LoRAs were trained on, or use the mode fast.",
            )

    def prepare(self, steps) -> None:
        """Bring all shared layers into the gauge, for the modes that run the model; mode fast merges in the same pass.
        `steps`: class of the progress counter."""
        count = steps(len(all_targets(self.loras)))
        if self.mode != FAST:
            self.prepared = prepare(*self.loras, self.strengths, self.prior, count)
            return
        self.merged = merge_fast(
            *self.loras,
            self.strengths,
            self.prior,
            self.settings.separation,
            self.settings.keep_strength,
            self.settings.max_rank,
            written_dtype(self.loras),
            count,
        )

    def run(self):
        """(LORA_MODEL, report, IMAGE)."""
        if self.mode != FAST:
            masks = self._masks()
            self.merged = assemble(self.prepared, masks, self.settings.max_rank)
            if self.mode == CALIBRATED and self.settings.solver == "router" and masks is not None:
                self._route()
        merged = self.merged
        other = pass_other(self.loras, list(self.strengths), self.notes, lambda i, target: self.prior(target)[i] == 0)
        sources = [
            report.describe(*each) for each in zip(self.loras, self.tensors, self.strengths, self.hashes, strict=True)
        ]
        recipe = {
            "node": "ZipRank Merge",
            "mode": self.mode,
            "separation": self.settings.separation,
            "prior": self.settings.prior,
            "keep_strength": self.settings.keep_strength,
            "max_rank": self.settings.max_rank,
            "loras": sources,
            "effective_ranks": report.effective_ranks(merged),
        }
        if self.settings.prior == "custom":
            recipe["custom_prior"] = self.settings.custom_prior
        recipe |= self._more()
        meta = report.metadata(recipe, self.family, merged)
        head = f"ZipRank Merge, {self.mode}: separation {self.settings.separation:g}, prior {self.settings.prior}"
        lines = [head, *report.ingredient_lines(self.loras, sources), *report.result_lines(self.loras, merged)]
        self.notes += folded_line(merged.adapters, other)
        lora = write_lora(merged.adapters, other, self.loras, self.family, self.known.key_map, meta)
        lines += merged.notes + self.notes + [f"Note: {line}" for line in merged.warnings]
        kept = {target: layer.kept for target, layer in merged.reports.items()}
        titles = ["content: share kept of each layer", "style: share kept of each layer"]
        return lora, "\n".join(lines), heat_map.draw(titles, kept, head, self.losses)

    def _masks(self):
        keep, separation = self.settings.keep_strength, self.settings.separation
        if self.prepared.moments is None:
            return None
        if self.mode == CALIBRATED:
            self.measured = model_modes.measure(self)
            start = solve_prepared(self.prepared, 1.0, False)
            return solve_calibrated(self.prepared, self.measured, separation, keep, start)
        trained, masks = model_modes.learn(self, solve_prepared(self.prepared, separation, keep))
        self.losses = trained.losses
        if trained.losses:
            self.notes.append(
                f"loss: {trained.losses[0]:.5g} at the first step, {trained.losses[-1]:.5g} at the last of "
                f"{len(trained.losses)}; the masks of step {trained.best_step} are used"
            )
        if trained.stopped is not None:
            self.notes.append(
                f"Stopped at step {trained.stopped} of {self.settings.steps}: the best masks so far are kept."
            )
        return masks

    def _route(self) -> None:
        """Replace the masked layers by routed ones (calibrated, solver router)."""
        for index, target in enumerate(self.prepared.targets):
            gauge, weights = self.prepared.gauges[index], self.prior(target)
            made = routed(gauge, self.measured[index], *weights, self.settings.separation)
            made, energy = cut(made, self.settings.max_rank)
            self.merged.adapters[target] = replace(made, kernel=self.prepared.kernels[index])
            kept, loss = on_own_inputs(made, gauge)
            self.merged.reports[target] = replace(
                self.merged.reports[target],
                rank=made.rank,
                kept=kept,
                loss=loss,
                effective=(),
                size=frobenius_norm(made),
                energy=energy,
            )

    def _more(self) -> dict:
        if self.mode == FAST:
            return {}
        names = ["content_prompt", "style_prompt", "seed", "size", "calibration_steps"]
        names += ["solver"] if self.mode == CALIBRATED else ["steps", "learning_rate", "cycle_weight", "prior_weight"]
        return {name: getattr(self.settings, name) for name in names}
