"""What is said of a merge: the report for the artist, and the recipe for the file's metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

import torch

from ..lora.reading import CanonicalLoRA
from .result import MergedLayers
from .targets import name_of

LARGE = 2.0  # times the plain sum: a merged change above it is exaggerated


def fingerprint(lora: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(lora):
        tensor = lora[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(lora: CanonicalLoRA, tensors: Mapping[str, torch.Tensor], strength: float, digest: str) -> dict:
    """One ingredient of a recipe. digest: its `fingerprint`."""
    ranks = sorted({adapter.rank for adapter in lora.adapters.values()})
    return {
        "name": lora.label,
        "file": getattr(tensors, "source", ""),
        "sha256": digest,
        "strength": strength,
        "layers": len(lora.adapters),
        "ranks": ranks,
        "kinds": lora.kinds,
    }


def _ranks(ranks: list[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}" if ranks else "none"


def ingredient_lines(loras: list[CanonicalLoRA], sources: list[dict]) -> list[str]:
    """A line for each LoRA, and one for keys of it that found no place."""
    lines = []
    for lora, source in zip(loras, sources):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(lora.kinds.items()))
        name = f"{lora.label} ({source['file']})" if source["file"] else lora.label
        lines.append(
            f"{name}: {len(lora.adapters)} layers ({kinds}), rank {_ranks(source['ranks'])}, "
            f"strength {source['strength']:g}"
        )
        if lora.unknown:
            shown = ", ".join(lora.unknown[:3]) + (" …" if len(lora.unknown) > 3 else "")
            lines.append(f"  left out: {len(lora.unknown)} keys have no place: {shown}")
    return lines


def mean(values) -> float | None:
    """Of what is not None."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def result_lines(loras: list[CanonicalLoRA], merged: MergedLayers) -> list[str]:
    """Shared layers and others, ranks, what is left of each LoRA, overlap, losses and the size of the change. A change
    that is much larger than the plain sum is added to the warnings."""
    reports = list(merged.reports.values())
    shared = sum(all(target in lora.adapters for lora in loras) for target in merged.reports)
    lines = [
        f"merged: {len(reports)} layers ({shared} shared, {len(reports) - shared} that not all LoRAs have), rank "
        f"{_ranks([r.rank for r in reports])}"
    ]
    for index, lora in enumerate(loras):
        kept = mean(r.kept[index] for r in reports if r.overlap is not None or r.loss is not None)
        if kept is not None:
            effective = mean(r.effective[index] for r in reports if r.effective)
            more = "" if effective is None else f", effective rank {effective:.1f}"
            lines.append(f"{lora.label}: {100 * kept:.0f} % kept in shared layers{more}")
    overlap, chance = mean(r.overlap for r in reports), mean(r.chance for r in reports)
    if overlap is not None:
        lines.append(f"overlap of the inputs: {overlap:.3f} (mean squared cosine; by chance about {chance:.3f})")
    loss, plain = mean(r.loss for r in reports), mean(r.loss_sum for r in reports)
    if loss is not None:
        beside = "" if plain is None else f"; loading both would have {plain:.4f}"
        lines.append(f"own-input loss: {loss:.4f} (0: each LoRA acts on its own inputs as if it were alone{beside})")
    energies = [r.energy for r in reports]
    if min(energies, default=1.0) < 1:
        lines.append(
            f"energy that the limit of the rank keeps: {100 * mean(energies):.2f} % of the squared size of a layer "
            f"(least: {100 * min(energies):.2f} %)"
        )
    return lines + size_lines(merged)


def size_lines(merged: MergedLayers) -> list[str]:
    """The size (Frobenius norm) of the merged change beside that of the plain sum, and a warning above `LARGE`."""
    reports = merged.reports.values()
    plain = math.sqrt(sum(r.sum_size**2 for r in reports))
    if plain == 0:
        return []
    ratio = math.sqrt(sum(r.size**2 for r in reports)) / plain
    if ratio > LARGE:
        merged.warnings.append(
            f"the merged change is {ratio:.1f} times as large as the plain sum of the LoRAs, so it may overdo both. "
            "Use a lower strength or separation, or another method."
        )
    return [f"size of the change: {ratio:.2f} times that of the plain sum"]


def effective_ranks(merged: MergedLayers) -> dict[str, list[float]]:
    """[effective ranks…] of each layer, for the recipe."""
    return {name_of(t): [round(e, 2) for e in r.effective] for t, r in merged.reports.items() if r.effective}


def metadata(recipe: Mapping, family: str, merged: MergedLayers) -> dict[str, str]:
    """Header of the file: our recipe, and what other tools look for."""
    found = {"styleloom.recipe": json.dumps(recipe, sort_keys=True), "modelspec.title": "StyleLoom merge"}
    if family in ("sdxl", "sd15"):
        ranks = {r.rank for r in merged.reports.values()}
        dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        base = "sdxl_base_v1-0" if family == "sdxl" else "sd_v1"
        found |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": dim,
            "ss_network_alpha": dim,
            "ss_base_model_version": base,
        }
    return found
