"""From encoded pictures to what the layers read: tokens of each picture by the name that `presets.choose` gives it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import comfy.model_management
import torch

from ....weights.errors import StyleLoomError
from ....weights.ip_adapter.combine import repeat_last
from ....weights.ip_adapter.dit_formats import INSTANTX_SD3, DiTAdapter
from ....weights.ip_adapter.formats import Adapter
from ....weights.ip_adapter.keys_values import BY_MASK, EACH, fuse, sides_of, turned, weighted
from ....weights.unet.presets import AWAY_FROM, LAYOUT, STYLE
from .vision_output import features


class Tokens:
    """Tokens for K (`keys`) and for V (`values`), by name; `notes` for the report, `counts` the references.

    For an adapter whose tokens change with the time step there are `features` instead, those of the positive and of the
    negative side. `values` are `keys` times `shares`, the weights of the tokens, (2, pictures, tokens, 1).

    Args:
        adapter: the IP-Adapter.
        used: the names that layers were given: "style", "layout" and those of `AWAY_FROM`.
        style, layout: encoded pictures; layout may be empty.
        negative: an encoded picture, or None.
        fusion: one of `FUSIONS`.
        weights: of the references of style; empty: none.
    """

    def __init__(
        self,
        adapter: Adapter | DiTAdapter,
        used: set[str],
        style: list,
        layout: list,
        negative,
        fusion: str,
        weights: Sequence[float] = (),
    ):
        self.adapter, self.negative, self.fusion = adapter, negative, fusion
        self._empties = [getattr(output, "styleloom_empty", None) for output in (*style, *layout)]
        self.keys: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.shares: dict[str, torch.Tensor] = {}
        self.features: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.counts: dict[str, int] = {}
        self.notes: list[str] = []
        away = {name: whose for whose, name in AWAY_FROM.items() if name in used}
        wanted = (used & {STYLE, LAYOUT}) | set(away.values()) | ({STYLE, LAYOUT} if away and layout else set())
        for name, pictures, given in ((STYLE, style, weights), (LAYOUT, layout, ())):
            if name in wanted:
                self._add(name, pictures, list(given))
        for name, whose in away.items():
            other = LAYOUT if whose == STYLE else STYLE
            for made in (self.keys, self.values):
                made[name] = turned(made[whose], made[other] if layout else None)

    def _add(self, name: str, outputs: list, weights: list[float]) -> None:
        references = features(self.adapter, outputs, name)
        count = self.counts[name] = len(references)
        if weights and self.fusion != EACH:
            if len(weights) > count:
                raise StyleLoomError(
                    f"reference_weights has {len(weights)} numbers, and {name} {count} references",
                    "at most one for each",
                    "Take the last ones out; for weights over the frames choose the fusion one per picture.",
                )
            if len(weights) < count:
                self.notes.append(f"reference_weights: the last of {len(weights)} stands for the rest of {count}")
            weights = repeat_last(weights, count)
        other = self._other(references)
        if self.fusion == EACH:
            negatives = 1 if other is None else len(other)
            counts = {"references": count, "weights": len(weights) or 1, "negatives": negatives}
            most = max(counts.values())
            short = [f"{n} {what}" for what, n in counts.items() if 1 < n < most]
            if short or 1 < count < most:
                self.notes.append(f"{name}: the last of {', '.join(short)} is used again, up to {most}")
        if self.adapter.kind == INSTANTX_SD3:
            self.features[name] = sides_of(self.adapter, references, other, self.fusion, weights or None)
            return
        made = fuse(self.adapter, references, other, self.fusion, weights or None)
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.keys[name] = made
        tokens = self.adapter.tokens or references.shape[1]
        self.values[name] = weighted(made, self.fusion, weights, tokens)
        self.shares[name] = weighted(torch.ones_like(made[..., :1]), self.fusion, weights, tokens)

    def _other(self, references: torch.Tensor) -> torch.Tensor | None:
        """Features for the negative side. Without a negative, what the encoder sees in an empty picture stands in for
        it: it comes with any of the encodings that Encode Style Image made."""
        if self.negative is not None:
            return features(self.adapter, [self.negative], "negative")
        if self.adapter.feature == "image_embeds" or isinstance(self.adapter, DiTAdapter):
            return None
        found = (empty for empty in self._empties if empty is not None and empty.shape[1:] == references.shape[1:])
        return next((empty.to(references) for empty in found), None)


def one_by_one(fusion: str, outputs: list) -> list[list]:
    """The references by injection: all in one, or with one per mask each on its own.

    A batch of encoded pictures is taken apart.
    """
    if fusion != BY_MASK:
        return [outputs]
    return [[part] for output in outputs for part in split(output)]


def split(output) -> list:
    """The pictures of a CLIP_VISION_OUTPUT, each as one of its own; what is noted on it goes with each."""
    hidden = getattr(output, "penultimate_hidden_states", None)
    count = len(hidden if isinstance(hidden, torch.Tensor) else output.image_embeds)
    parts = []
    for i in range(count):
        part = copy.copy(output)
        for name, value in vars(output).items():
            if isinstance(value, torch.Tensor) and name != "styleloom_empty" and len(value) == count:
                part[name] = value[i : i + 1]
        parts.append(part)
    return parts


def masks_of(fusion: str, mask: torch.Tensor | None, groups: int) -> list[torch.Tensor | None]:
    """The mask of each injection.

    Raises:
        StyleLoomError: one per mask without as many masks as references.
    """
    if fusion != BY_MASK:
        return [mask]
    found = 0 if mask is None else 1 if mask.ndim == 2 else len(mask)
    if found != groups:
        raise StyleLoomError(
            f"fusion is one per mask, style has {groups} references and mask {found} masks",
            "a mask for each reference",
            "Connect masks of Encode Style Image (fit tiled or tiles), or a batch of masks; or choose another fusion.",
        )
    return [mask] if mask.ndim == 2 else [mask[i : i + 1] for i in range(groups)]
