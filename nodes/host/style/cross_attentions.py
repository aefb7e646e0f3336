"""The cross-attentions of a UNet of the host's, as the tables of `weights/unet/architecture.py` name them."""

from __future__ import annotations

from ....weights.errors import StyleLoomError
from ....weights.unet.architecture import ARCHITECTURES, Architecture, Layer
from ....weights.ip_adapter.formats import Adapter


def cross_attentions(unet) -> dict[Layer, object]:
    """Layer → its cross-attention module, in forward order; empty for what is no UNet."""
    found = {}
    stages = [(("input", i), block) for i, block in enumerate(getattr(unet, "input_blocks", ()))]
    stages += [(("middle", 0), block) for block in [getattr(unet, "middle_block", None)] if block is not None]
    stages += [(("output", i), block) for i, block in enumerate(getattr(unet, "output_blocks", ()))]
    for name, block in stages:
        for part in block:
            for i, layer in enumerate(getattr(part, "transformer_blocks", ())):
                if getattr(layer, "attn2", None) is not None:
                    found[(*name, i)] = layer.attn2
    return found


def check_fit(model, adapter: Adapter) -> Architecture:
    """The architecture of a model, once the adapter is known to fit it layer by layer.

    Raises:
        StyleLoomError: another kind of model than the adapter's, or another width.
    """
    layers = cross_attentions(model.model.diffusion_model)
    name = type(model.model).__name__
    architecture = next((a for a in ARCHITECTURES if a.layers == list(layers)), None)
    if architecture is not adapter.architecture:
        raise StyleLoomError(
            f"model is {architecture.name if architecture else f'{name} with {len(layers)} cross-attentions'}, and "
            f"{adapter.name} is made for {adapter.architecture.name}",
            f"a model of {adapter.architecture.name} ({len(adapter.architecture.layers)} cross-attentions)",
            "Choose the IP-Adapter of this base model. There is none for models without a UNet of this kind.",
        )
    numbers = adapter.architecture.file_numbers
    for layer, module in layers.items():
        width = module.heads * module.dim_head
        given = adapter.layers[numbers[layer]][0].shape[0]
        if given != width:
            raise StyleLoomError(
                f"{adapter.name}: {numbers[layer]}.to_k_ip.weight makes {given} numbers, and {layer} of model is "
                f"{width} wide",
                "an IP-Adapter for a model of this width",
                "Choose the IP-Adapter of this base model.",
            )
    return architecture
