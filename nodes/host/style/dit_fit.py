"""Whether an IP-Adapter for a transformer fits a MODEL, and which settings of Style Block Injector it knows."""

from __future__ import annotations

from collections.abc import Sequence

from ....weights.dit.style_blocks import DiTArchitecture
from ....weights.errors import StyleLoomError
from ....weights.ip_adapter.combine import WAYS
from ....weights.ip_adapter.dit_formats import INSTANTX_SD3, DiTAdapter
from ....weights.ip_adapter.keys_values import SCALINGS, V_ONLY

_SD3 = "OpenAISignatureMMDITWrapper"


def check_transformer(model, adapter: DiTAdapter) -> DiTArchitecture:
    """The blocks that the adapter has weights for, once it is known to fit the model.

    Raises:
        StyleLoomError: another kind of model, another number of blocks, or another width.
    """
    net, due = model.model.diffusion_model, adapter.architecture
    kind, name = ("joint", _SD3) if adapter.kind == INSTANTX_SD3 else ("double", "Flux")
    counts = [len(getattr(net, f"{part}_blocks", ())) for part in (kind, "single")]
    wanted = [len(due.blocks), 0] if kind == "joint" else [due.split.double, due.split.single]
    hidden = getattr(net, "hidden_size", 0)
    own = kind == "joint" and getattr(net, "x_block_self_attn_layers", ())
    if type(net).__name__ != name or counts != wanted or hidden != adapter.hidden or own:
        blocks = " and ".join(f"{n} {part}" for part, n in zip((kind, "single"), wanted) if n)
        raise StyleLoomError(
            f"model is {type(model.model).__name__} ({counts[0]} {kind} and {counts[1]} single blocks, {hidden} wide), "
            f"and {adapter.name} is made for {due.name}",
            f"a model of {due.name} ({blocks} blocks, {adapter.hidden} wide), or one that was trained from it",
            "Choose the IP-Adapter of this base model; SD3.5-medium, FLUX.2 and Chroma are other models.",
        )
    return due


def check_settings(adapter: DiTAdapter, scaling: str, fusion: str, weights: Sequence[float]) -> None:
    """Refuses what has no meaning for a transformer.

    Raises:
        StyleLoomError: a scaling other than V; for SD3.5 weights of references that are not made into one.
    """
    if scaling != V_ONLY:
        raise StyleLoomError(
            f"scaling is {scaling}, and {adapter.name} is for {adapter.model}, a transformer",
            f"scaling {V_ONLY}: {', '.join(s for s in SCALINGS if s != V_ONLY)} are made for the layers of a UNet",
            f"Choose {V_ONLY}.",
        )
    if adapter.kind == INSTANTX_SD3 and weights and fusion not in WAYS:
        raise StyleLoomError(
            f"reference_weights is given and fusion is {fusion}: the adapter of {adapter.model} attends to its tokens "
            "and to the picture's own at once, so a weight of a single reference is not defined",
            f"a fusion that makes one of the references: {', '.join(WAYS)}",
            "Empty reference_weights, or choose one of these.",
        )
