"""Which CLIP image tower made an embedding, and which text tower was trained with it.

An embedding does not say where it is from, but its sizes do: width of the hidden states, number of tokens, length of
the projected vector. Two towers can share one of them (bigG's vector and ViT-H's hidden states are both 1280 wide),
none shares all three. Sizes: the configurations of OpenCLIP ViT-H-14 and ViT-bigG-14 (laion2B) and of OpenAI's
ViT-L-14 and ViT-L-14-336.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import StyleLoomError


@dataclass(frozen=True)
class ImageTower:
    """An image encoder: width of its hidden states, length of `image_embeds`, tokens a picture; its text tower.

    `file` is where to get it, in words for a message.
    """

    name: str
    hidden: int
    projection: int
    tokens: int
    text: str
    file: str


@dataclass(frozen=True)
class TextTower:
    """A text encoder: width and layers; what an image tower's `text` names. `where` is for a message."""

    name: str
    hidden: int
    layers: int
    where: str


VIT_H = ImageTower(
    "ViT-H", 1280, 1024, 257, "OpenCLIP ViT-H text", "CLIP-ViT-H-14 (models/image_encoder of h94/IP-Adapter)"
)
BIG_G = ImageTower(
    "ViT-bigG",
    1664,
    1280,
    257,
    "OpenCLIP bigG text",
    "CLIP-ViT-bigG-14 (sdxl_models/image_encoder of h94/IP-Adapter, or clip_vision_g)",
)
VIT_L = ImageTower("ViT-L", 1024, 768, 257, "OpenAI CLIP-L text", "OpenAI's CLIP ViT-L/14")
VIT_L_336 = ImageTower(
    "ViT-L-336",
    1024,
    768,
    577,
    "OpenAI CLIP-L-336 text",
    "OpenAI's CLIP ViT-L/14-336 (image_encoder of Kwai-Kolors/Kolors-IP-Adapter-Plus)",
)
IMAGE_TOWERS = (VIT_H, BIG_G, VIT_L, VIT_L_336)
TEXT_TOWERS = (
    TextTower("OpenCLIP bigG text", 1280, 32, "the CLIP of an SDXL checkpoint"),
    TextTower(
        "OpenCLIP ViT-H text",
        1024,
        24,
        "the text encoder of OpenCLIP ViT-H (model.safetensors of laion/CLIP-ViT-H-14-laion2B-s32B-b79K in "
        "models/text_encoders, with Load CLIP of type stable_diffusion; SD2's has no projection)",
    ),
    TextTower("OpenAI CLIP-L text", 768, 12, "clip_l.safetensors with its text_projection (Load CLIP)"),
)


def image_tower(hidden: int, projection: int, tokens: int) -> ImageTower | None:
    """The known tower of exactly these sizes, else None."""
    return next((t for t in IMAGE_TOWERS if (t.hidden, t.projection, t.tokens) == (hidden, projection, tokens)), None)


def text_tower(hidden: int, layers: int) -> TextTower | None:
    """The known text tower of these sizes, else None. SD2 was published with 23 of ViT-H's 24 layers."""
    return next((t for t in TEXT_TOWERS if t.hidden == hidden and layers in (t.layers, t.layers - 1)), None)


def check_pair(image: tuple[int, int, int], text: tuple[int, int], projected: int) -> str:
    """Whether a picture's embedding and a text's live in one space.

    Args:
        image: (hidden, projection, tokens) of the image tower. text: (hidden, layers) of the text tower.
        projected: length of the text tower's projected vector.

    Returns:
        What is known of the pair, for a report.

    Raises:
        StyleLoomError: towers that were not trained together, also where their vectors happen to have one length.
    """
    seen, read = image_tower(*image), text_tower(*text)
    partner = next((t for t in TEXT_TOWERS if seen and t.name == seen.text), None)
    if seen and read and seen.text == read.name:
        return f"{seen.name} and {read.name}"
    if seen or read:
        raise StyleLoomError(
            f"style was encoded by {seen.name if seen else _sizes(*image)}, and clip has "
            f"{read.name if read else f'a text tower of width {text[0]} with {text[1]} layers'}",
            f"the text tower that was trained with the image encoder: {seen.text if seen else 'unknown'}",
            f"Connect {partner.where} to clip."
            if partner
            else f"Encode the picture with {_partner_file(read)}."
            if read
            else "No file of its text tower is published for ComfyUI: use a picture of the content as negative.",
        )
    if image[1] != projected:
        raise StyleLoomError(
            f"style is {image[1]} numbers long and the text vectors of clip are {projected}",
            "an image and a text tower that were trained together",
            "Use the text encoder that belongs to the image encoder.",
        )
    return f"{_sizes(*image)} and a text tower of width {text[0]}: not known, only their sizes agree"


def _sizes(hidden: int, projection: int, tokens: int) -> str:
    return f"an image tower of width {hidden} ({tokens} tokens, {projection} projected)"


def _partner_file(read: TextTower) -> str:
    return next((t.file for t in IMAGE_TOWERS if t.text == read.name), "the image tower of that text tower")
