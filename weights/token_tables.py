"""The token table of any diffusion model that one is known for."""

from __future__ import annotations

from .dit.tokens import ARCHITECTURES, DiTTokens
from .places import NoPlaces
from .unet.tokens import CLASSES, UNetTokens

Tokens = DiTTokens | UNetTokens


def tokens_of(model) -> Tokens:
    """
    Args:
        model: The diffusion model itself (the module that holds the blocks).

    Raises:
        NoPlaces: no table for its class.
    """
    name = type(model).__name__
    if name in CLASSES:
        return UNetTokens()
    if name in ARCHITECTURES:
        return DiTTokens(model)
    raise NoPlaces(f"the class {name}")
