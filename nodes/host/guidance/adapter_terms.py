"""The host's adapters as terms: what each kind does to a layer's output, without the layer's weight."""

from __future__ import annotations

from ....weights.lora.kinds import NoTerm, Place, UnknownAdapter, from_host, kinds_of
from ....weights.lora.low_rank import LowRank
from ....weights.row_adapters.terms import Term

__all__ = ["NoTerm", "Place", "term_of"]


def term_of(adapter, place: Place) -> Term | LowRank:
    """A term, or a `LowRank` where the adapter is low-rank on a linear layer, to be stacked with others.

    Args:
        adapter: An adapter of the host's, or a patch tuple such as ("diff", (change,)).

    Raises:
        NoTerm: The change depends on the weight itself (DoRA), replaces it, or the layer is of no known kind; the host
            has an adapter that the table of kinds does not describe.
    """
    if place.layer is None:
        raise NoTerm("a layer of another kind than linear, convolution or norm")
    try:
        parts = from_host(adapter)
        ((kind, own),) = kinds_of(parts, place.key)
    except UnknownAdapter as unknown:
        raise NoTerm(str(unknown)) from unknown
    return kind.row_form(own, place)
