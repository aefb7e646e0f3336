"""From the LoRAs of both branches to terms on layers, and weight hooks for the few patches that have no term."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping

import comfy.hooks
import torch

from ....weights.row_adapters.layers import layer_of
from ....weights.lora.low_rank import LowRank
from ....weights.row_adapters.low_rank import LowRankTerm
from ....weights.row_adapters.regional import RegionalLowRank
from ....weights.row_adapters.regions import Region
from ....weights.row_adapters.rows import NEGATIVE, POSITIVE
from ....weights.row_adapters.terms import OutputTransform, Term
from ....weights.errors import StyleLoomError
from ....weights.lora.files import check_finite
from ....weights.lora.names import is_text_key
from .adapter_terms import NoTerm, Place, term_of
from .regions import PlannedRegions, no_region
from .schedule import BranchLoRA, Schedule
from ..fused_layers import is_quantised, may_be_fused
from ..lora_patches import find_module, left_out, lora_patches, passed_over
from ..missing_keys import ERROR, some
from ..prefix_cache import without_prefix_cache
from ..row_terms import computed_in, parts_of

NAMES = {POSITIVE: "positive", NEGATIVE: "negative"}


@dataclasses.dataclass
class Plan:
    """What is to be done in the model's layers.

    Attributes:
        terms: Layer's name in the model → branch → terms, in the order of their LoRAs.
        hooks: Branch → the host's HookGroup for what only a changed weight can do, or None.
        schedules: Branch → one schedule for each of its LoRAs; a term's `source` counts them.
        strengths: Branch → their strengths.
        loras: Branch → the LoRAs that act, as they were given.
        patches: Layer's name → (branch, source, target, patch), for layers that the host may compute without calling
            them; see `hook_layers`.
        norms: Those among them that are norms.
        quantised: The model has quantised layers, with which the host's weight hooks stop.
        changes: A weight's key → (branch, source, target, patch): what takes the place of `hooks` then.
        options: What the run adds to `transformer_options`.
        report: What was made of what, in lines.
        regions: Where LoRAs with a mask act.
    """

    terms: dict[str, dict[int, list[Term]]]
    hooks: dict[int, comfy.hooks.HookGroup | None]
    schedules: dict[int, list[Schedule]]
    strengths: dict[int, list[float]]
    report: list[str]
    regions: PlannedRegions
    patches: dict[str, list[tuple]] = dataclasses.field(default_factory=dict)
    norms: set[str] = dataclasses.field(default_factory=set)
    quantised: bool = False
    changes: dict[str, list[tuple]] = dataclasses.field(default_factory=dict)
    options: dict[str, dict] = dataclasses.field(default_factory=dict)
    loras: dict[int, list[BranchLoRA]] = dataclasses.field(default_factory=dict)

    @property
    def acts(self) -> bool:
        """Anything is different from side to side, or from step to step."""
        return bool(self.terms or self.changes or any(self.hooks.values()))

    def of_steps(self, sigmas: torch.Tensor) -> None:
        """Tell the schedules the sigmas of all steps, and where the last one ends."""
        for schedules in self.schedules.values():
            for schedule in schedules:
                schedule.of_steps(sigmas)

    def tell(self, line: str, level: int = logging.WARNING) -> None:
        """A line for the report, once, and for the log: sampling has shown it, and a guider's report is out by then."""
        if line not in self.report:
            self.report.append(line)
            logging.log(level, "StyleLoom: Asymmetric CFG: %s", line.strip())

    def hook_layers(self, names: Iterable[str]) -> None:
        """Hand layers over to the host's weight hooks that are computed without being called: norms that attention
        computes fused with the rotary embedding, quantised layers in one kernel with what stands before them.

        Raises:
            StyleLoomError: a LoRA with a mask on one of them; the plan stays as it was.
        """
        names = list(names)
        for name in names:  # all of them first: a plan that is refused stays whole, for the next run of its guider
            for branch, source, _, _ in self.patches[name]:
                if source in self.regions.has_places(branch, name):
                    region = self.regions.regions[branch][source]
                    raise no_region(region, "a layer that the model computes without calling it", name)
        for name in names:
            del self.terms[name]
            for branch, source, target, patch in self.patches.pop(name):
                self.hook(branch, source, {target: patch})
        if self.norms.intersection(names):
            self.tell(f"  norms that attention computes itself go through {self.otherwise}", logging.INFO)
        layers = [name for name in names if name not in self.norms]
        if layers:
            self.tell(
                f"  {len(layers)} layers that the model computes without calling them go through {self.otherwise}: "
                f"{some(layers)}"
            )

    @property
    def otherwise(self) -> str:
        """What is done for patches that have no term."""
        return (
            "weights that are changed at each use, with the sides one after the other"
            if self.quantised
            else "ComfyUI's weight hooks, which run the sides one after the other and patch these weights in every step"
        )

    def hook(self, branch: int, source: int, patches: dict) -> None:
        """The host's own way for patches that it shall merge: by conditioning, as its LoRA hooks do. See
        `changed_weights` for models on which that stops."""
        if self.quantised:
            for target, patch in patches.items():
                self.changes.setdefault(parts_of(target)[0], []).append((branch, source, target, patch))
            return
        hook = comfy.hooks.WeightHook(strength_model=self.strengths[branch][source], strength_clip=0.0)
        hook.weights, hook.weights_clip = patches, {}
        hook.need_weight_init = False
        hook.hook_keyframe = self.schedules[branch][source]
        group = self.hooks[branch] = self.hooks[branch] or comfy.hooks.HookGroup()
        group.add(hook)

    def holder(self) -> torch.nn.Module:
        """One module with all tensors, for the host to account for and to move."""
        return torch.nn.ModuleList(
            term for branches in self.terms.values() for made in branches.values() for term in made
        )


def make_plan(model, branches: Mapping[int, list[BranchLoRA]], missing: str = ERROR) -> Plan:
    """Read the LoRAs of both branches for one model.

    Args:
        model: MODEL; nothing of it is changed.
        branches: POSITIVE and NEGATIVE → their LoRAs. Strength 0 and empty windows are left out.
        missing: What becomes of keys that find no place: `ERROR` or `WARN`.

    Raises:
        StyleLoomError: a LoRA for another architecture or of another size, NaN, incomplete patches.
    """
    plan = Plan({}, {}, {}, {}, [], PlannedRegions(model), quantised=any(map(is_quantised, model.model.modules())))
    dtype = computed_in(model)
    for branch, entries in branches.items():
        acting = [entry for entry in entries if entry.acts]
        plan.schedules[branch] = [Schedule(entry) for entry in acting]
        plan.strengths[branch] = [entry.strength for entry in acting]
        plan.loras[branch] = acting
        plan.hooks[branch] = None
        plan.regions.regions[branch] = [_region(branch, source, entry) for source, entry in enumerate(acting)]
        pending: dict[str, list[Term | tuple[LowRank, int]]] = {}
        for source, entry in enumerate(acting):
            _read(plan, model, branch, source, entry, dtype, pending, missing)
        for name, made in pending.items():
            layer, places = layer_of(find_module(model.model, name)), plan.regions.has_places(branch, name)
            plan.terms.setdefault(name, {})[branch] = _stacked(made, layer, dtype, places)
        apart = sum(entry.strength != 0 and not entry.acts for entry in entries)
        if apart:
            plan.report.append(
                f"{NAMES[branch]}: {apart} of {len(entries)} LoRAs left out: their start_percent and end_percent lie "
                f"outside those of the {NAMES[branch]} side"
            )
        if not acting:
            plan.report.append(f"{NAMES[branch]}: the model as it is")
    if plan.acts:
        plan.options = without_prefix_cache(model.model.diffusion_model)
    if plan.options:
        plan.report.append("the model's cache of prompt and references is off in this run: it knows nothing of LoRAs")
    return plan


def _read(plan: Plan, model, branch: int, source: int, entry: BranchLoRA, dtype, pending: dict, missing: str) -> None:
    label = _label(branch, source)
    patches, missed, text = _patches_of(model, entry, label, missing)
    whole = passed_over([model.model], patches)
    region, elsewhere = plan.regions.regions[branch][source], 0
    left, why, kinds = {}, Counter(), Counter()
    for target, adapter in patches.items():
        key, part, swap = parts_of(target)
        name, _, parameter = key.rpartition(".")
        layer = layer_of(find_module(model.model, name)) if parameter in ("weight", "bias") else None
        placed = region is not None and plan.regions.acts_in(name, layer, region)
        if region is not None and not placed and not region.elsewhere:
            elsewhere += 1
            continue
        try:
            if target in whole:
                raise NoTerm("a parameter beside the layers")
            term = term_of(adapter, Place(key, parameter, layer, source, part, swap, dtype))
            if isinstance(term, OutputTransform) and layer.bias and _quantised(model, name):
                raise NoTerm(f"{adapter.name} on a quantised layer with a bias")
        except NoTerm as reason:
            if placed:
                raise no_region(region, str(reason), key) from reason
            left[target] = adapter
            why[str(reason)] += 1
            continue
        kinds["LoRA" if isinstance(term, LowRank) else adapter[0] if isinstance(adapter, tuple) else adapter.name] += 1
        if placed and not isinstance(term, LowRank):
            term = plan.regions.term(term, key, region)
        pending.setdefault(name, []).append((term, source) if isinstance(term, LowRank) else term)
        if layer.kind == "norm":
            plan.norms.add(name)
        if layer.kind == "norm" or may_be_fused(find_module(model.model, name)):
            plan.patches.setdefault(name, []).append((branch, source, target, adapter))

    made = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    plan.report.append(
        f"{label}{f' ({entry.name})' if entry.name else ''}: {len(patches)} patches at strength {entry.strength:g}"
        + (
            f", {entry.start_percent:g} to {entry.end_percent:g} of sampling"
            if not plan.schedules[branch][source].constant
            else ""
        )
        + (f"; in one pass: {made}" if made else "")
    )
    if region is not None:
        plan.report.append(_where(region, elsewhere, len(patches)))
    if left:
        plan.report.append(
            f"  {len(left)} through {plan.otherwise}: "
            f"{', '.join(f'{count} x {reason}' for reason, count in why.items())}; "
            f"{some(parts_of(target)[0] for target in left)}"
        )
        plan.hook(branch, source, left)
    plan.report += [f"  {line}" for line in missed + left_out(patches)]
    if text:
        plan.report.append(
            f"  {len(text)} keys are for a text encoder, which a sampler cannot change any more: apply this LoRA to "
            f"the clip of the {NAMES[branch]} prompt with Apply LoRA or ComfyUI's Load LoRA"
        )
        logging.warning("StyleLoom: Asymmetric CFG: %s", plan.report[-1].strip())


def _patches_of(model, entry: BranchLoRA, label: str, missing: str) -> tuple[Mapping, list[str], list[str]]:
    """(the host's patches for the diffusion model, lines about what is left out, keys for a text encoder)."""
    if entry.patches is not None:
        return entry.patches, [], []
    text = [key for key in entry.lora if is_text_key(key)]
    lora = {key: value for key, value in entry.lora.items() if not is_text_key(key)}
    if not lora:
        raise StyleLoomError(
            f"the {label} has no part for the diffusion model"
            + (f": all of its {len(text)} keys are for a text encoder" if text else ": it is empty"),
            "a LoRA with keys of the diffusion model",
            "Apply a LoRA for the text encoder to the clip of this side's prompt, with Apply LoRA or Load LoRA.",
        )
    check_finite(lora, f"the {label}")
    missed: list[str] = []
    patches = lora_patches(model, None, lora, label, missing, missed)
    for line in missed:
        logging.warning("StyleLoom: Asymmetric CFG: %s", line)
    return patches, missed, text


def _quantised(model, name: str) -> bool:
    weight = getattr(find_module(model.model, name), "weight", None)
    return (
        weight is None
        or type(weight.data) is not torch.Tensor
        or not weight.is_floating_point()
        or weight.dtype.itemsize < 2
    )


def _label(branch: int, source: int) -> str:
    return f"{NAMES[branch]} LoRA" + (f" {source + 1}" if source else "")


def _region(branch: int, source: int, entry: BranchLoRA) -> Region | None:
    if not entry.masks:
        return None
    return Region(_label(branch, source), entry.masks, 1.0 if entry.text_tokens == "whole" else 0.0)


def _where(region: Region, elsewhere: int, patches: int) -> str:
    """The line of the report for a mask. Raises StyleLoomError: nothing of the LoRA has a place."""
    if elsewhere == patches:
        raise StyleLoomError(
            f"the {region.name} has a mask, and all of its {patches} patches are for text, time or modulation, which "
            "have no place in the picture",
            "patches of layers that see the picture",
            "Set text_tokens to whole, or leave mask unconnected.",
        )
    rest = "have the whole of it" if region.elsewhere else f"have none of it ({elsewhere} patches left out)"
    return f"  in the region of its mask; text, time, modulation and reference pictures {rest}"


def _stacked(made: list[Term | tuple[LowRank, int]], layer, dtype, masked: set[int]) -> list[Term]:
    """Neighbouring low-rank changes on the same inputs become one term; `masked` are the sources with a region."""
    terms: list[Term] = []
    waiting: dict[object, list[tuple[LowRank, int]]] = {}

    def flush() -> None:
        for pairs in waiting.values():
            regional = any(source in masked for _, source in pairs)
            terms.append((RegionalLowRank if regional else LowRankTerm)(layer, pairs, dtype))
        waiting.clear()

    for entry in made:
        if isinstance(entry, tuple):
            waiting.setdefault(entry[0].inputs, []).append(entry)
        else:
            flush()
            terms.append(entry)
    flush()
    return terms
