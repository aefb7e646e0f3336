"""Merge LoRAs: the baselines, over any number of LoRAs."""

from __future__ import annotations

import logging
import math

from comfy_api.latest import io

from ..weights.errors import StyleLoomError
from ..weights.lora.writing import write_lora, written_dtype
from ..weights.merge import report
from ..weights.merge.alignment import align, all_targets, check_sizes
from ..weights.merge.methods import METHODS, Options
from ..weights.merge.other_parts import folded_line, pass_other
from ..weights.merge.several_loras import merge_many, pass_through_factors
from ..weights.parallel import map_single_threaded
from .host.merge import heat_map
from .host.key_maps import model_targets
from .host.progress import Steps
from .types import CATEGORY_LORA, LoRA

MAX_INPUTS = 16


class MergeLoRAs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        loras = io.Autogrow.TemplatePrefix(
            LoRA.Input(
                "lora", tooltip="A LoRA from Load LoRA File; all for one base model, ranks and formats may differ."
            ),
            prefix="lora",
            min=2,
            max=MAX_INPUTS,
        )
        return io.Schema(
            node_id="StyleLoomMergeLoRAs",
            display_name="Merge LoRAs",
            category=CATEGORY_LORA,
            description="Merges two or more LoRAs by a method of your choice. All work on the changes of the weights "
            "themselves, so ranks, alphas and formats may differ. For content and style there is ZipRank Merge.",
            search_aliases=["merge lora", "combine loras", "ties", "dare", "svd merge", "ziplora", "np-lora", "ssr"],
            inputs=[
                io.Autogrow.Input(
                    "loras",
                    template=loras,
                    tooltip="Connect a LoRA and another input appears. In the API: loras.lora0, loras.lora1, …",
                ),
                io.String.Input(
                    "strengths",
                    default="",
                    tooltip="One number per LoRA, for example: 1, 0.8. Empty: 1 for all. 0 leaves one out.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="sum",
                    tooltip="sum: as loading them all. average: the sum of everything over the number of LoRAs. SVD: "
                    "the sum, cut to the largest of their ranks. TIES and DARE: entry by entry, slower, and cut to "
                    "max_rank (the report says what is lost). ZipLoRA columns: masks from 0 to 2 over the inputs, "
                    "slower. NP-LoRA: each is kept out of the inputs of those after it, so connect the style last. "
                    "router: mixes the ranks so that each LoRA acts on its own inputs.",
                ),
                io.Int.Input(
                    "max_rank",
                    default=0,
                    min=0,
                    max=2048,
                    tooltip="0: no limit (for TIES and DARE the sum of the ranks). Another number gives the best "
                    "approximation of that rank.",
                ),
                io.Float.Input(
                    "energy",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="1 keeps everything. 0.99 drops the smallest directions of each layer as long as 99 "
                    "percent of the squared size remains.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="For DARE, which drops entries at random."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model, to match the names of any architecture; without it SDXL is known. It is "
                    "not changed.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="For LoRAs that have parts for the text encoder."),
                io.Float.Input(
                    "density",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="TIES and DARE: the share of entries that is kept.",
                ),
                io.Float.Input(
                    "mu",
                    default=0.5,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="NP-LoRA: how strictly a LoRA is kept out of the others' inputs. 0.5 is as published.",
                ),
                io.Float.Input(
                    "ridge",
                    default=0.1,
                    min=0.001,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="router: larger is more careful, smaller separates more and may exaggerate.",
                ),
            ],
            outputs=[
                LoRA.Output(display_name="lora", tooltip="For Apply LoRA, Save LoRA File and ComfyUI's own nodes."),
                io.String.Output(display_name="report", tooltip="What was merged, and how much of each is left."),
                io.Image.Output(
                    display_name="masks",
                    tooltip="A heat map: how much of each LoRA is left on its own inputs, in each layer of each block.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, loras, strengths, method, max_rank, energy, seed, model=None, clip=None, density=0.5, mu=0.5, ridge=0.1
    ) -> io.NodeOutput:
        given = [loras[name] for name in sorted(loras, key=lambda name: (len(name), name)) if loras[name] is not None]
        weights = parse_strengths(strengths, len(given))
        known = model_targets(model, clip)
        read = [known.read(lora, f"lora{index}") for index, lora in enumerate(given)]
        if len(read) > 1:
            align(read, known.weight_shape)
            check_sizes(read, known.weight_shape)
        options = Options(density=density, mu=mu, ridge=ridge, seed=seed)
        steps = Steps(len(all_targets(read)))
        merged = merge_many(read, weights, method, options, max_rank, energy, written_dtype(read), steps)
        notes: list[str] = []
        other = pass_other(read, pass_through_factors(method, weights), notes)
        family = known.family or read[0].family
        with map_single_threaded(report.fingerprint, given) as hashes:
            sources = [report.describe(*each) for each in zip(read, given, weights, hashes, strict=True)]
        recipe = {
            "node": "Merge LoRAs",
            "method": method,
            "max_rank": max_rank,
            "energy": energy,
            "seed": seed,
            "density": density,
            "mu": mu,
            "ridge": ridge,
            "loras": sources,
        }
        meta = report.metadata(recipe, family, merged)
        head = f"Merge LoRAs: {method}"
        lines = [head, *report.ingredient_lines(read, sources), *report.result_lines(read, merged)]
        notes += folded_line(merged.adapters, other)
        lora = write_lora(merged.adapters, other, read, family, known.key_map, meta)
        lines += [*notes, *(f"Note: {line}" for line in merged.warnings)]
        for line in merged.warnings:
            logging.warning("StyleLoom: %s", line)
        titles = [f"{lora.label}: share left on its own inputs" for lora in read]
        kept = {target: layer.kept for target, layer in merged.reports.items()}
        return io.NodeOutput(lora, "\n".join(lines), heat_map.draw(titles, kept, head))


def parse_strengths(text: str, count: int) -> list[float]:
    """Numbers out of what was typed; 1 for each where nothing was.

    Raises:
        StyleLoomError: no number, not finite, or not one for each LoRA.
    """
    typed = text.replace(";", ",").replace(",", " ").split()
    if not typed:
        return [1.0] * count
    numbers, problem = [], ""
    for word in typed:
        try:
            numbers.append(float(word))
        except ValueError:
            problem = problem or f"{word!r} is no number"
            continue
        if not math.isfinite(numbers[-1]):
            problem = problem or f"{word!r} is not a finite number"
    if len(typed) != count:
        problem = problem or f"it has {len(typed)} number{'s' if len(typed) != 1 else ''} for {count} LoRAs"
    if problem:
        raise StyleLoomError(
            f"strengths is {text!r}: {problem}",
            "one number for each LoRA, or nothing",
            "Write for example: 1, 0.8",
        )
    return numbers
