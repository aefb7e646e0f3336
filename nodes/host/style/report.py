"""What Style Block Injector says that it did: kind of adapter, encoder, layers, references, what was repeated; and what
Redux by Blocks does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ....weights.dit.style_blocks import DiTArchitecture
from ....weights.ip_adapter.dit_formats import DiTAdapter
from ....weights.ip_adapter.formats import Adapter
from ....weights.ip_adapter.keys_values import EACH
from ....weights.unet.architecture import Architecture, Block, Layer
from ....weights.unet.presets import AWAY_FROM, CUSTOM


def injection_report(
    adapter: Adapter | DiTAdapter,
    architecture: Architecture | DiTArchitecture,
    preset: str,
    chosen: Mapping[Layer, tuple[float, str]],
    counts: Mapping[str, int],
    fusion: str,
    scaling: str,
    settings: Sequence[str],
    notes: Sequence[str],
) -> str:
    """A few lines for an artist.

    Args:
        chosen: from `presets.choose`. counts: references by name. settings, notes: further lines.
    """
    total = len(architecture.layers)
    lines = [f"{adapter.name}: {adapter.label}"]
    if not chosen:
        return "\n".join([*lines, f"preset {preset}: every weight is 0, the model is as it was"])
    lines.append(f"preset {preset}: {len(chosen)} of {total} layers, scaling {scaling}")
    blocks: dict[tuple[float, str], list[str]] = {}
    for block, depth, _ in architecture.blocks:
        own = [chosen[layer] for i in range(depth) if (layer := (*block, i)) in chosen]
        for what in dict.fromkeys(own):
            part = "" if own.count(what) == depth else f" ({own.count(what)} of {depth} layers)"
            blocks.setdefault(what, []).append(f"{block[0]} {block[1]}{part}")
    away = set(AWAY_FROM.values())
    for (weight, whose), names in blocks.items():
        how = f"{whose} (the negative side sees the picture)" if whose in away else whose
        names = _in_ranges(names) if isinstance(architecture, DiTArchitecture) else names
        lines.append(f"  {how} at {weight:.4g}: {', '.join(names)}")
    said = ", ".join(f"{name} {count}" for name, count in counts.items())
    lines.append(f"references: {said}; fusion {fusion}")
    if fusion == EACH and any(count > 1 for count in counts.values()):
        lines.append("  where the batch is longer, the last is used again; where it is shorter, the rest is not used")
    return "\n".join([*lines, *settings, *(f"note: {note}" for note in notes)])


def redux_report(preset: str, seen: Mapping[Block, float], tokens: int, pictures: int, written: bool) -> str:
    """What Redux by Blocks says. seen: block -> strength; written: whether block_weights has a text."""
    by_strength: dict[float, list[str]] = {}
    for (kind, i), strength in seen.items():
        by_strength.setdefault(strength, []).append(f"{kind} {i}")
    hidden = by_strength.pop(0.0, [])
    lines = [f"Redux: {tokens} tokens of {pictures} picture{'s' * (pictures > 1)} behind the text"]
    lines.append(f"preset {preset}: seen in {len(seen) - len(hidden)} of {len(seen)} blocks")
    lines += [f"  at {strength:.4g}: {', '.join(_in_ranges(names))}" for strength, names in by_strength.items()]
    if hidden:
        lines.append(f"  not at all: {', '.join(_in_ranges(hidden))}")
    if written and preset != CUSTOM:
        lines.append(f"note: block_weights count only in preset {CUSTOM}; preset is {preset}")
    return "\n".join(lines)


def _in_ranges(names: Sequence[str]) -> list[str]:
    """"single 3", "single 4", "single 5" as "single 3-5"."""
    runs: list[list] = []
    for name in names:
        kind, number = name.rsplit(" ", 1)
        if runs and runs[-1][0] == kind and runs[-1][2] + 1 == int(number):
            runs[-1][2] = int(number)
        else:
            runs.append([kind, int(number), int(number)])
    return [f"{kind} {first}-{last}" if first != last else f"{kind} {first}" for kind, first, last in runs]


def injection_settings(start: float, end: float, mask, negative, weights: Sequence[float], steps: Sequence[float]):
    """Lines for the settings that are not at their defaults."""
    lines = ["negative side: " + ("a picture" if negative is not None else "nothing, as published")]
    if (start, end) != (0.0, 1.0):
        lines.append(f"acts from {start:.0%} to {end:.0%} of the schedule")
    if mask is not None:
        lines.append(f"mask: {1 if mask.ndim == 2 else len(mask)}")
    if weights:
        lines.append("reference_weights: " + _short(weights))
    if steps:
        lines.append("step_weights: " + _short(steps))
    return lines


def _short(values: Sequence[float]) -> str:
    shown = ", ".join(f"{v:.4g}" for v in values[:12])
    return shown + (f", and {len(values) - 12} more" if len(values) > 12 else "")
