"""The table of the kinds of adapters that a LoRA file may hold. Whatever reads, checks, filters, merges, applies or
writes a LoRA asks it; a new kind is a new file and a row here.

| kind | change of the weight | merged | strength in the file | rows of a batch |
|---|---|---|---|---|
| LoRA, LoCon, Tucker | alpha/rank · up·down | yes | alpha | low rank |
| LoHa | alpha/rank · (a₁b₁) ∘ (a₂b₂) | yes | alpha | multiplied out |
| LoKr | alpha/rank · w₁ ⊗ w₂ | yes | alpha or w₁ | Kronecker; convolutions multiplied out |
| GLoRA | alpha/rank · (W A + B) | no | alpha or factors | before and after the layer |
| OFT, BOFT | L W | no | no | after the layer |
| IA3 | the host reads none | no | no | no |
| DoRA | another kind and a magnitude | no | no | no: it needs the weight |
| difference (`diff`, `w_norm`, `diff_b`, `b_norm`) | itself | added up | itself | itself |
| set weight | the weight is replaced | passed on | no | no |
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...errors import StyleLoomError
from ..low_rank import LowRank
from .base import AddedKind, Kind, NoTerm, Parts, Place, damaged
from .boft import BOFTKind
from .difference import BiasChange, FullDifference, SetWeight
from .dora import DoRAKind
from .glora import GLoRAKind
from .ia3 import IA3Kind
from .loha import LoHaKind
from .lokr import LoKrKind
from .lora import LoRAKind
from .oft import OFTKind

LORA, LOHA, LOKR, GLORA, OFT, BOFT = LoRAKind(), LoHaKind(), LoKrKind(), GLoRAKind(), OFTKind(), BOFTKind()
DORA = DoRAKind((LORA, LOHA, LOKR, GLORA, OFT, BOFT))
IA3 = IA3Kind()
DIFFERENCE, BIAS_CHANGE, SET_WEIGHT = FullDifference(), BiasChange(), SetWeight()

KINDS: tuple[Kind, ...] = (*DORA.others, IA3, DORA, DIFFERENCE, BIAS_CHANGE, SET_WEIGHT)

def kinds_of(parts: Parts, stem: str) -> list[tuple[Kind, dict[str, Any]]]:
    """The kinds that the parts under one stem make, each with its own parts, which are all there and fit together. At
    most one of them is an adapter of the weight; full differences may stand beside it.

    Raises:
        StyleLoomError: two adapters in one, parts that are missing or do not fit.
    """
    found = [DORA] if DORA.claims(parts) else [kind for kind in KINDS if kind.on_weight and kind.claims(parts)]
    if len(found) > 1:
        names = " and of a ".join(kind.name for kind in found)
        raise damaged(stem, f"it has parts of a {names}", "one adapter for each layer")
    found += [kind for kind in KINDS if not kind.on_weight and kind.claims(parts)]
    made = [(kind, kind.own(parts)) for kind in found]
    for kind, own in made:
        kind.check(own, stem)
    return made


class UnknownAdapter(Exception):
    """The host has an adapter that the table does not describe; the message says which."""


def from_host(adapter) -> dict[str, Any]:
    """The parts of an adapter, or patch tuple, that the host has read from a file. Absent ones are left out.

    Raises:
        UnknownAdapter: a kind, or a member of one, that this table does not have: a newer host may have more.
    """
    if isinstance(adapter, tuple):
        name, values = (adapter[0], tuple(adapter[1])) if len(adapter) == 2 else ("diff", tuple(adapter))
    else:
        name, values = adapter.name, tuple(adapter.weights)
    kind = next((kind for kind in KINDS if kind.host_name == name), None)
    if kind is None:
        raise UnknownAdapter(f"an adapter of the kind {name}")
    more = [number for number, value in enumerate(values) if value is not None and number >= len(kind.host_order)]
    if more or len(values) < len(kind.host_order):
        raise UnknownAdapter(
            f"a {kind.name} adapter with {len(values)} members, where {len(kind.host_order)} are known "
            f"({', '.join(kind.host_order)})"
        )
    return {part: value for part, value in zip(kind.host_order, values) if value is not None}


def to_host(adapter, parts: Parts):
    """The host's adapter again, or patch tuple, with other parts, in its order."""
    if isinstance(adapter, tuple):
        return adapter
    kind = next(kind for kind in KINDS if kind.host_name == adapter.name)
    more = adapter.weights[len(kind.host_order) :]
    return type(adapter)(adapter.loaded_keys, (*(parts.get(part) for part in kind.host_order), *more))


def low_rank(parts: Parts, stem: str, known: Kind | None = None) -> LowRank:
    """The change that one adapter makes, as a product, exactly and without forming it.

    Args:
        parts: the parts under one stem, from a file.
        stem: for messages.
        known: the kind, where `kinds_of` has found it, and these are its own parts. None: it is asked here.

    Raises:
        StyleLoomError: a kind that cannot be merged, halves of an adapter, ranks that disagree, NaN or infinity.
    """
    if known is None:
        ((kind, own),) = [row for row in kinds_of(parts, stem) if row[0].on_weight]
    else:
        kind, own = known, parts
    if not isinstance(kind, AddedKind):
        raise StyleLoomError(
            f"{stem} is {'an' if kind.name[0] in 'IO' else 'a'} {kind.name} adapter",
            "a LoRA, LoCon, LoHa or LoKr",
            f"{kind.not_merged}, so it cannot be merged as a LoRA. Load it beside the merged LoRA with ComfyUI's "
            "Load LoRA, or extract a LoRA from the model patched with it.",
        )
    check_finite_parts(own, stem)
    found = kind.low_rank(own)
    multiplied = found.up.dtype != own["up"].dtype if kind is LORA else True  # else they are the parts themselves
    if multiplied and not (bool(found.up.isfinite().all()) and bool(found.down.isfinite().all())):
        raise damaged(stem, "the product of its parts is too large for float32", "smaller numbers")
    return found


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity. A sum keeps nothing and is finite unless a part is not, or
    the parts are huge; 8-bit floats have no sum of their own."""
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(tensor.sum(dtype=wide).item()) or bool(tensor.isfinite().all())


def check_finite_parts(parts: Parts, stem: str) -> None:
    """Raise StyleLoomError where a tensor holds NaN or infinity."""
    for part, value in parts.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not is_finite(value):
            raise StyleLoomError(
                f"{stem}: the LoRA holds NaN or infinity in {part}",
                "finite numbers",
                "The training of this LoRA diverged, or the file is damaged: use an earlier save, or download it "
                "again.",
            )


__all__ = ["KINDS", "Kind", "NoTerm", "Place", "UnknownAdapter", "from_host", "kinds_of", "low_rank", "to_host"]
