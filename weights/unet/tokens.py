"""The token table of the UNets of SD1.5, SD2 and SDXL: every layer but those of text and time sees the whole picture,
at the latent's size halved some times."""

from __future__ import annotations

import math
import re

from ..places import NOWHERE, PICTURE, Given, Grid, Layout, NoPlaces, Unplaced

CLASSES = frozenset({"UNetModel"})

_NOWHERE = re.compile(r"(time_embed|label_emb)\b|.*\.emb_layers\.|.*\.attn2\.to_[kv]\b")
_PICTURE = re.compile(r"(input_blocks|middle_block|output_blocks|out)\.")
_VIDEO = re.compile(r".*\.(time_\w+|temporal_\w+)\b")


class UNetTokens:
    """The table; it asks nothing of a single model. Attributes as in `dit.tokens.DiTTokens`."""

    pictures = texts = refused = ()
    patch = Grid(1, 1, 1)

    def stream(self, layer: str) -> str:
        """What runs through a layer, by its name in the diffusion model.

        Raises:
            NoPlaces: a layer that the table does not name; layers of a video UNet, which see frames as rows.
        """
        if _NOWHERE.match(layer):
            return NOWHERE
        if _PICTURE.match(layer) and not _VIDEO.match(layer):
            return PICTURE
        raise NoPlaces(f"the layer {layer} of a UNet")

    def layout(self, stream: str, shape: tuple[int, ...], given: Given) -> Layout:
        """Where the tokens of a layer stand; a map is the picture, whatever its size.

        Raises:
            Unplaced: a sequence that is the latent at none of its sizes.
        """
        tokens = math.prod(shape)
        if len(shape) == 2:
            return ((tokens, Grid(1, *shape)),)
        _, height, width = given.latent
        while height * width > tokens and max(height, width) > 1:
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width == tokens and len(shape) == 1 and given.latent.frames == 1:
            return ((tokens, Grid(1, height, width)),)
        raise Unplaced(f"it has {tokens} tokens for a latent of {given.latent.height} x {given.latent.width}")
