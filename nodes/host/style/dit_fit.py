"""Whether an IP-Adapter for a transformer fits a MODEL, and which settings of Style Block Injector it knows."""

from __future__ import annotations

from ....weights.dit.style_blocks import DiTArchitecture
from ....weights.errors import StyleLoomError
from ....weights.ip_adapter.dit_formats import DiTAdapter
from ....weights.ip_adapter.keys_values import SCALINGS, V_ONLY


def check_transformer(model, adapter: DiTAdapter) -> DiTArchitecture:
    """The blocks that the adapter has weights for, once it is known to fit the model.

    Raises:
        StyleLoomError: another kind of model, another number of blocks, or another width.
    """
    net = model.model.diffusion_model
    name, due = type(net).__name__, adapter.architecture
    counts = [len(getattr(net, f"{kind}_blocks", ())) for kind in ("double", "single")]
    found = f"{name} with {counts[0]} double and {counts[1]} single blocks"
    fits = name == "Flux" and counts == [due.split.double, due.split.single]
    if fits and net.hidden_size != adapter.hidden:
        fits, found = False, f"{found}, {net.hidden_size} wide"
    if not fits:
        raise StyleLoomError(
            f"model is {type(model.model).__name__} ({found}), and {adapter.name} is made for {due.name}",
            f"a model of {due.name} ({due.split.double} double and {due.split.single} single blocks, {adapter.hidden} "
            "wide): dev, schnell, Fill, Kontext and what is trained from them",
            "Choose the IP-Adapter of this base model.",
        )
    return due


def check_settings(adapter: DiTAdapter, scaling: str) -> None:
    """Refuses what has no meaning for a transformer.

    Raises:
        StyleLoomError: a scaling other than V.
    """
    if scaling != V_ONLY:
        raise StyleLoomError(
            f"scaling is {scaling}, and {adapter.name} is for {adapter.model}, a transformer",
            f"scaling {V_ONLY}: {', '.join(s for s in SCALINGS if s != V_ONLY)} are made for the layers of a UNet",
            f"Choose {V_ONLY}.",
        )
