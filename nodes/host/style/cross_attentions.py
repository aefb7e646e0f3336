"""The cross-attentions of a UNet of the host's, as the tables of `weights/unet/architecture.py` name them."""

from __future__ import annotations

import torch

from ....weights.errors import StyleLoomError
from ....weights.unet.architecture import ARCHITECTURES, SDXL, Architecture, Layer
from ....weights.dit.style_blocks import DiTArchitecture
from ....weights.ip_adapter.dit_formats import DiTAdapter
from ....weights.ip_adapter.formats import Adapter
from .dit_fit import check_transformer


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


_KOLORS_SIZES = 5632  # numbers that Kolors' UNet is told of the picture and the text; SDXL's is told 2816


def _is_kolors(unet) -> bool:
    embed = getattr(unet, "label_emb", None)
    first = embed[0][0] if isinstance(embed, torch.nn.Sequential) else None
    return getattr(first, "in_features", 0) == _KOLORS_SIZES


def check_fit(model, adapter: Adapter | DiTAdapter) -> Architecture | DiTArchitecture:
    """The architecture of a model, once the adapter is known to fit it layer by layer.

    Raises:
        StyleLoomError: another kind of model than the adapter's, or another width of its layers or of its text.
    """
    if isinstance(adapter, DiTAdapter):
        return check_transformer(model, adapter)
    unet = model.model.diffusion_model
    layers = cross_attentions(unet)
    name = type(model.model).__name__
    architecture = next((a for a in ARCHITECTURES if a.layers == list(layers)), None)
    if architecture is not adapter.architecture:
        raise StyleLoomError(
            f"model is {architecture.name if architecture else f'{name} with {len(layers)} cross-attentions'}, and "
            f"{adapter.name} is made for {adapter.architecture.name}",
            f"a model of {adapter.architecture.name} ({len(adapter.architecture.layers)} cross-attentions)",
            "Choose the IP-Adapter of this base model. There is none for models without a UNet of this kind.",
        )
    if architecture is SDXL and _is_kolors(unet) != adapter.is_for_kolors:
        raise StyleLoomError(
            f"model is {'Kolors' if _is_kolors(unet) else 'SDXL'}, and {adapter.name} is made for {adapter.model}: "
            "both have one UNet, trained with different text encoders",
            f"a model of {adapter.model}",
            "Choose the IP-Adapter of this base model.",
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
        text = getattr(module.to_k, "in_features", adapter.cross)
        if text != adapter.cross:
            raise StyleLoomError(
                f"{layer} of model reads text that is {text} wide, and {adapter.name} makes tokens of {adapter.cross}",
                f"a model whose text is {adapter.cross} wide"
                + (" (SD1.5; SD2 has 1024)" if adapter.cross == 768 else ""),
                "Choose the IP-Adapter of this base model. SD2 has the blocks of SD1.5, and none is published for it.",
            )
    return architecture
