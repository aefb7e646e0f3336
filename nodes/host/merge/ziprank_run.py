"""The course of a ZipRank merge, from two LORA_MODELs to the merged one, its report and its picture."""

from __future__ import annotations

from ....weights.errors import StyleLoomError
from ....weights.lora.low_rank import LowRank
from ....weights.lora.algebra import truncate
from ....weights.lora.writing import write_lora
from ....weights.merge import report as words
from ....weights.merge.calibrated import routed, solve_calibrated
from ....weights.merge.two_loras import assemble, prepare, solve_fast
from ....weights.merge.gauge import sides
from ....weights.merge.alignment import align, all_targets, check_sizes, pass_other
from ....weights.merge.measure import own_input
from ....weights.merge.priors import layer_prior
from . import heat_map as merge_picture
from . import model_modes as merge_runs
from ..key_maps import model_targets

FAST, CALIBRATED, TRAIN = MODES = ("fast", "calibrated", "train")


class ZipRank:
    """One merge. `prepare`, then `run`; `merged` holds the layers afterwards."""

    def __init__(self, content, style, model, clip, mode: str, settings: dict):
        self.tensors, self.model, self.clip, self.mode, self.settings = (content, style), model, clip, mode, settings
        self.strengths = (settings["content_strength"], settings["style_strength"])
        self.losses: list[float] = []
        self.notes: list[str] = []
        if mode != FAST:
            self._check_needs()
        self.known = model_targets(model, clip)
        self.loras = [self.known.read(lora, name) for lora, name in zip(self.tensors, ("content_lora", "style_lora"))]
        align(self.loras, self.known.weight_shape)
        check_sizes(self.loras, self.known.weight_shape)
        self.family = self.known.family or self.loras[0].family
        self.prior, note = layer_prior(settings["prior"], self.family, settings.get("custom_prior", ""))
        if note:
            self.notes.append(note)

    def _check_needs(self) -> None:
        lacking = [name for name in ("model", "clip") if getattr(self, name) is None]
        if lacking:
            raise StyleLoomError(
                f"mode {self.mode} without {' and '.join(lacking)}",
                "the base model and its text encoder",
                "Connect model and clip of the checkpoint that both LoRAs were trained on, or use the mode fast.",
            )

    def prepare(self, steps) -> None:
        """Bring all shared layers into the gauge. `steps`: class of the progress counter."""
        count = steps(len(all_targets(self.loras)))
        self.prepared = prepare(*self.loras, self.strengths, count)
        for lora, empty in zip(self.loras, self.prepared.empty):
            if empty:
                self.notes.append(f"{lora.label}: {empty} layers change nothing (untrained, or strength 0)")

    def run(self):
        """(LORA_MODEL, report, IMAGE)."""
        masks = self._masks()
        self.merged = assemble(self.prepared, masks, self.settings["max_rank"])
        if self.mode == CALIBRATED and self.settings["solver"] == "router" and masks is not None:
            self._route()
        other = pass_other(self.loras, list(self.strengths), self.notes)
        sources = [words.describe(*item) for item in zip(self.loras, self.tensors, self.strengths)]
        recipe = {
            "node": "ZipRank Merge",
            "mode": self.mode,
            "separation": self.settings["separation"],
            "prior": self.settings["prior"],
            "keep_strength": self.settings.get("keep_strength", True),
            "max_rank": self.settings["max_rank"],
            "loras": sources,
            "effective_ranks": words.effective_ranks(self.merged),
        }
        if self.settings["prior"] == "custom":
            recipe["custom_prior"] = self.settings["custom_prior"]
        recipe |= self._more()
        meta = words.metadata(recipe, self.family, self.merged)
        lora = write_lora(self.merged.adapters, other, self.loras, self.family, self.known.key_map, meta)
        head = f"ZipRank Merge, {self.mode}: separation {self.settings['separation']:g}, prior {self.settings['prior']}"
        lines = [head, *words.ingredient_lines(self.loras, sources), *words.result_lines(self.loras, self.merged)]
        lines += self.notes + [f"Note: {line}" for line in self.merged.warnings]
        kept = {target: report.kept for target, report in self.merged.reports.items()}
        titles = ["content: share kept of each layer", "style: share kept of each layer"]
        return lora, "\n".join(lines), merge_picture.draw(titles, kept, head, self.losses)

    def _masks(self):
        keep, separation = self.settings.get("keep_strength", True), self.settings["separation"]
        if self.mode == FAST or self.prepared.moments is None:
            return solve_fast(self.prepared, self.prior, separation, keep)
        if self.mode == CALIBRATED:
            self.measured = merge_runs.measure(self)
            start = solve_fast(self.prepared, self.prior, 1.0, False, limit=1.0)
            return solve_calibrated(self.prepared, self.measured, self.prior, separation, keep, start)
        start = solve_fast(self.prepared, self.prior, separation, keep, limit=1.0)
        trained, masks = merge_runs.learn(self, start)
        self.losses = trained.losses
        if trained.losses:
            self.notes.append(
                f"loss: {trained.losses[0]:.5g} at the first step, {trained.losses[-1]:.5g} at the last of "
                f"{len(trained.losses)}; the masks of step {trained.best_step} are used"
            )
        if trained.stopped is not None:
            self.notes.append(
                f"Stopped at step {trained.stopped} of {self.settings['steps']}: the best masks so far are kept."
            )
        return masks

    def _route(self) -> None:
        """Replace the masked layers by routed ones (calibrated, solver router)."""
        for index, target in enumerate(self.prepared.targets):
            gauge, weights = self.prepared.gauges[index], self.prior(target)
            made = routed(gauge, self.measured[index], *weights, self.settings["separation"])
            if self.settings["max_rank"]:
                made = truncate(made, self.settings["max_rank"])
            self.merged.adapters[target] = LowRank(made.down, made.up, self.prepared.kernels[index])
            report = self.merged.reports[target]
            own = [own_input(made, side) for side in sides(gauge)]
            report.rank, report.effective = made.rank, ()
            report.kept, report.loss = tuple(gain for gain, _ in own), sum(loss for _, loss in own) / 2

    def _more(self) -> dict:
        if self.mode == FAST:
            return {}
        names = ["content_prompt", "style_prompt", "seed", "size", "calibration_steps"]
        names += ["solver"] if self.mode == CALIBRATED else ["steps", "learning_rate", "cycle_weight", "prior_weight"]
        return {name: self.settings[name] for name in names}
