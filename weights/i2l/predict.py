"""The whole way from references to one LoRA: open, check, decode, fuse, and say what was done."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..errors import StyleLoomError
from ..lora.algebra import frobenius_norm
from ..lora.lora_model import split_pairs
from ..lora.low_rank import LowRank
from ..tensor_file import Header, TensorFile, fingerprint, read_header
from .decode import decode
from .fusion import check_bias, fuse_target, parse_weights
from .header import Recognised, recognise_predictor
from .layouts import targets
from .references import References


@dataclass(frozen=True)
class Predictor:
    """A predictor's file, recognised and named; its weights stay on disk."""

    name: str
    header: Header
    recognised: Recognised
    fingerprint: str

    @property
    def spec(self):
        return self.recognised.spec

    @property
    def kind(self) -> str:
        """'style' for predictors of the picture alone, else 'coarse', 'fine' or 'unknown'."""
        return self.spec.residual.kind if self.spec.residual else "style"


@dataclass(frozen=True)
class Prediction:
    """`factors` by target; `recipe` can be written as JSON; `warnings` are what only came up here, and are part of
    `report` with those of opening the predictors."""

    factors: dict[str, LowRank]
    recipe: dict
    report: str
    warnings: list[str]


def open_predictor(path: str | os.PathLike, name: str = "") -> Predictor:
    """Recognise a predictor file. Raises StyleLoomError where it is none (see `recognise_predictor`)."""
    header = read_header(path)
    return Predictor(name or header.name, header, recognise_predictor(header), fingerprint(header))


def step_count(predictor: Predictor, fine: Predictor | None = None) -> int:
    """How often `on_step` will be called: once for each target of each predictor."""
    return sum(1 for _ in targets(predictor.spec.family)) * (2 if fine is not None else 1)


def _check_pair(predictor: Predictor, fine: Predictor) -> None:
    if fine.kind != "fine":
        raise StyleLoomError(
            f"predictor_fine is {fine.name} ({fine.recognised.label})",
            "a Fine predictor",
            "Load Qwen-Image-i2L-Fine there, or leave predictor_fine unconnected.",
        )
    if predictor.kind == "fine":
        raise StyleLoomError(
            f"both predictors are Fine ({predictor.name}, {fine.name})",
            "Coarse and Fine",
            "Put Qwen-Image-i2L-Coarse into predictor.",
        )
    if predictor.spec.family != fine.spec.family or predictor.spec.widths != fine.spec.widths:
        raise StyleLoomError(
            f"{predictor.name} makes LoRAs for {predictor.spec.family.label} {predictor.spec.widths}, {fine.name} for "
            f"{fine.spec.family.label} {fine.spec.widths}",
            "two predictors for one base model",
            "Load two files of one publication.",
        )


def _read_bias(bias: Mapping[str, torch.Tensor], predictor: Predictor) -> dict[str, LowRank]:
    pairs, rest = split_pairs(bias)
    widths = predictor.spec.widths
    shapes = {t.name: (widths[t.a_width], widths[t.b_width]) for t in targets(predictor.spec.family)}
    check_bias(pairs, rest, list(shapes), shapes.__getitem__)
    return pairs


def predict_lora(
    predictor: Predictor,
    references: References,
    *,
    strength: float = 1.0,
    fine: Predictor | None = None,
    image_weights: str = "",
    max_rank: int = 0,
    arithmetic: str = "reference",
    bias: Mapping[str, torch.Tensor] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Prediction:
    """Predict the LoRA of the references.

    Args:
        predictor, fine: from `open_predictor`; with `fine`, `predictor` is the Coarse one.
        references: N encoded pictures.
        strength, image_weights, max_rank, arithmetic: see `fuse`, `parse_weights`, `decode`.
        bias: a LoRA of exactly the predictor's targets, appended to the rank.
        on_step: called `step_count` times; what it raises stops the work and leaves nothing behind.

    Raises:
        StyleLoomError: predictors, references, weights or bias that do not fit each other; NaN in a file.
    """
    if fine is not None:
        _check_pair(predictor, fine)
    used = [predictor] + ([fine] if fine is not None else [])
    weights = parse_weights(image_weights, len(references))
    extra = None if bias is None else _read_bias(bias, predictor)

    earlier: list[dict[str, list[LowRank]]] = []

    def fuse_and_measure(name: str, pairs: list[LowRank]) -> tuple[LowRank, float]:
        predicted = [*(found[name] for found in earlier), pairs]
        pair = fuse_target(predicted, weights, strength, max_rank, None if extra is None else extra[name])
        return pair, frobenius_norm(pair)

    for each in used:
        with TensorFile(each.header) as file:
            work = (file, each.spec, references.embeddings, references.residual(each.kind), arithmetic, on_step)
            if each is not used[-1]:
                earlier.append(decode(*work))
            else:
                fused = decode(*work, finish=fuse_and_measure)
    factors = {name: pair for name, (pair, _) in fused.items()}
    norms = {name: norm for name, (_, norm) in fused.items()}

    known = [f"{each.name}: {each.recognised.warning}" for each in used if each.recognised.warning]
    warnings = []
    if predictor.kind == "fine":
        warnings.append(f"{predictor.name} is a Fine predictor, published for use together with Coarse")
    if references.residual("coarse") is not None and predictor.kind == "style":
        warnings.append(f"{predictor.name} does not read the text encoder's view of the pictures: it is not used")
    recipe = {
        "node": "Image-to-LoRA Predictor",
        "family": predictor.spec.family.name,
        "predictors": [
            {
                "name": each.name,
                "checkpoint": each.recognised.label,
                "key_hash": each.recognised.key_hash,
                "fingerprint": each.fingerprint,
            }
            for each in used
        ],
        "images": [{"sha256": digest, "weight": weight} for digest, weight in zip(references.images, weights)],
        "encoders": references.encoders,
        "strength": strength,
        "arithmetic": arithmetic,
        "bias": extra is not None,
        "rank": max(pair.rank for pair in factors.values()),
        "max_rank": max_rank,
    }
    return Prediction(factors, recipe, _report(recipe, factors, norms, known + warnings), warnings)


def _report(recipe: dict, factors: dict[str, LowRank], norms: dict[str, float], warnings: list[str]) -> str:
    largest = sorted(norms, key=norms.get, reverse=True)[:3]
    total = sum(norm * norm for norm in norms.values()) ** 0.5
    size = sum(t.numel() * t.element_size() for pair in factors.values() for t in (pair.down, pair.up))
    lines = [
        f"{len(factors)} targets of {recipe['family']}, rank {recipe['rank']}, {size / 1e6:.1f} MB",
        "from "
        + " + ".join(f"{p['name']} ({p['checkpoint']})" for p in recipe["predictors"])
        + (" + bias" if recipe["bias"] else ""),
        f"{len(recipe['images'])} pictures, weights "
        + ", ".join(f"{i['weight']:.3g}" for i in recipe["images"])
        + f"; strength {recipe['strength']:g}; {recipe['arithmetic']} arithmetic",
        f"norm of the whole change {total:.4g}; largest: " + ", ".join(f"{name} {norms[name]:.3g}" for name in largest),
    ]
    return "\n".join(lines + [f"warning: {line}" for line in warnings])
