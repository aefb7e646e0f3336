"""From chosen layers and encoded pictures to an injection on a MODEL, by kind of adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ....weights.ip_adapter.dit_formats import INSTANTX_SD3, XLABS, DiTAdapter
from ....weights.ip_adapter.dit_keys_values import project_flux
from ....weights.ip_adapter.formats import Adapter
from ....weights.ip_adapter.keys_values import EACH, project
from ....weights.unet.architecture import Layer
from .attention import StyleAttention
from .dit_attention import DiTStyle
from .flux_blocks import InstantXBlock, XLabsBlock
from .references import Tokens
from .sd3_blocks import install_sd3


def install(
    model,
    adapter: Adapter | DiTAdapter,
    chosen: Mapping[Layer, tuple[float, str]],
    made: Tokens,
    scaling: str,
    progress: Callable[[], None],
    **when,
):
    """A clone of the MODEL with one injection more.

    Args:
        chosen: layer → (weight, whose picture). made: the pictures. when: mask, start, end and steps of
            `StyleAttention`.
    """
    dtype = model.model.get_dtype_inference()
    if not isinstance(adapter, DiTAdapter):
        layers = project(adapter, chosen, made.keys, scaling, dtype, progress, made.values)
        return StyleAttention(layers, **when).install(model)
    if adapter.kind == INSTANTX_SD3:
        for _ in chosen:
            progress()  # there is nothing to make before sampling
        return install_sd3(model, adapter, chosen, made.features, made.fusion == EACH, **when)
    heads = model.model.diffusion_model.num_heads
    layers = project_flux(adapter, chosen, made.keys, made.shares, heads, dtype, progress)
    return DiTStyle(XLabsBlock if adapter.kind == XLABS else InstantXBlock, layers, **when).install(model)
