"""Content Subtract."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..weights.clip_space.subtract import DIRECTIONAL, METHODS, NEUTRAL, Options, describe, subtract
from ..weights.clip_space.towers import image_tower
from ..weights.errors import StyleLoomError
from .host.style.text_projection import find_tower, text_vectors
from .host.style.vision_output import sizes, with_embeds
from .types import CATEGORY_STYLE


class ContentSubtract(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomContentSubtract",
            display_name="Content Subtract",
            category=CATEGORY_STYLE,
            description="Takes what you name, or what a few pictures show, out of an encoded picture, so that its "
            "style is left. For base IP-Adapters, unCLIP and whatever reads the picture's one vector. Plus adapters "
            "read patches, which no text describes: for them, connect a picture of the content to negative of Style "
            "Block Injector.",
            search_aliases=["instantstyle", "neg content", "remove content", "content leakage", "concept subtraction"],
            inputs=[
                io.ClipVisionOutput.Input("style", tooltip="The encoded picture or pictures."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder that was trained with the image encoder: an SDXL checkpoint's for "
                    "ViT-bigG; for ViT-H the text encoder of OpenCLIP ViT-H. Others are refused. Not needed with "
                    "content_pictures.",
                ),
                io.String.Input(
                    "content",
                    default="",
                    multiline=True,
                    tooltip="What is to be seen in the picture, one concept a line, for example: a cat.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="rejection: removes exactly what points towards the content. instantstyle: subtracts the "
                    "text's vector, as published. subspace: removes each of several concepts. concept bank: many "
                    "phrases for one concept. mask: removes the numbers that content and picture share most.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="0 changes nothing. 1 removes all of it with rejection, subspace, concept bank and mask. "
                    "For instantstyle the publishers use 0.5 to 1.",
                ),
                io.String.Input(
                    "protect",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Words of the style that must stay, one a line, for example: watercolour.",
                ),
                io.Boolean.Input(
                    "gap_correction",
                    default=True,
                    optional=True,
                    tooltip="Leaves out of the content what every text has in common. For rejection, subspace and "
                    "concept bank.",
                ),
                io.Boolean.Input(
                    "one_sided",
                    default=True,
                    optional=True,
                    tooltip="Never adds the opposite of a concept that the picture does not have. For rejection, "
                    "subspace and concept bank.",
                ),
                io.Boolean.Input(
                    "renormalise",
                    default=False,
                    optional=True,
                    tooltip="Gives the result the length of the original. Off as published: a shorter vector acts "
                    "more weakly.",
                ),
                io.ClipVisionOutput.Input(
                    "content_pictures",
                    optional=True,
                    advanced=True,
                    tooltip="A few encoded pictures that show the content in other styles. They take the place of "
                    "content, and no text encoder is needed. Encode them like the style.",
                ),
                io.ClipVisionOutput.Input(
                    "neutral_pictures",
                    optional=True,
                    advanced=True,
                    tooltip="With content_pictures: encoded pictures of anything else. What they share with those is "
                    "left in. Without them an empty picture stands in, which Encode Style Image brings along.",
                ),
            ],
            outputs=[
                io.ClipVisionOutput.Output(display_name="style", tooltip="The encoded picture without the content."),
                io.String.Output(
                    display_name="report",
                    tooltip="How close the picture is to each concept before and after, and which towers were used.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        style,
        content,
        method,
        strength,
        clip=None,
        protect="",
        gap_correction=True,
        one_sided=True,
        renormalise=False,
        content_pictures=None,
        neutral_pictures=None,
    ) -> io.NodeOutput:
        options = Options(method, strength, gap_correction, one_sided, renormalise)
        seen = sizes(style, "style")
        if content_pictures is not None:
            words = _by_pictures(style, content_pictures, neutral_pictures, _lines(protect), options)
        else:
            words = _by_words(clip, seen, _lines(content), _lines(protect), options)
        concepts, (t, s, n), pair = words
        z = style.image_embeds
        changed = subtract(z.cpu(), t, options, s, n).to(z.device)
        report = describe(z.cpu(), changed.cpu(), t, concepts, options, pair)
        if content_pictures is not None and _lines(content):
            report += "\ncontent does not count: content_pictures say what is taken out"
        return io.NodeOutput(with_embeds(style, changed, f"{method}: {', '.join(concepts)}"), report)


Vectors = tuple[list[str], tuple[torch.Tensor, torch.Tensor, torch.Tensor], str]


def _by_words(clip, seen: tuple[int, int, int], concepts: list[str], kept: list[str], options: Options) -> Vectors:
    """(concepts, their vectors and those of the protected and the neutral words, which towers), by a text encoder.

    Args:
        seen: sizes of the image tower.
    """
    if not concepts:
        raise StyleLoomError(
            "content is empty",
            "what is to be taken out, one concept a line",
            "Write for example: a cat. Or connect encoded pictures of it to content_pictures.",
        )
    if clip is None:
        raise StyleLoomError(
            "clip is not connected",
            "the text encoder that was trained with the image encoder, or pictures of the content",
            "Connect clip. Where there is none that fits, connect a few encoded pictures of the content to "
            "content_pictures.",
        )
    tower = find_tower(clip, seen)
    neutral = list(NEUTRAL) if options.gap_correction and options.method in DIRECTIONAL else []
    vectors = text_vectors(clip, tower, concepts + kept + neutral)
    return concepts, vectors.split([len(concepts), len(kept), len(neutral)]), tower.pair


def _by_pictures(style, content, neutral, protect: list[str], options: Options) -> Vectors:
    """The same by pictures that show the content: their vectors lie in the space of the style's."""
    seen = sizes(style, "style")
    for output, name in ((content, "content_pictures"), (neutral, "neutral_pictures")):
        if output is not None and sizes(output, name) != seen:
            raise StyleLoomError(
                f"{name} was encoded by another encoder than style",
                "one encoder for all of them",
                "Encode them with the same Load CLIP Vision.",
            )
    if protect:
        raise StyleLoomError(
            "protect has words, and the content is given by pictures",
            "nothing in protect",
            "Words and pictures of CLIP lie apart, so words cannot be kept out of what pictures share: clear protect.",
        )
    t = content.image_embeds.float().cpu()
    n, tower = t[:0], image_tower(*seen)
    if options.gap_correction and options.method in DIRECTIONAL:
        brought = (getattr(output, "styleloom_empty_embeds", None) for output in (style, content))
        empty = next((embeds for embeds in brought if embeds is not None), None)
        if neutral is None and empty is None:
            raise StyleLoomError(
                "gap_correction is on, and there is nothing neutral to compare content_pictures with",
                "neutral_pictures, or an encoding by Encode Style Image, which brings an empty picture along",
                "Encode the pictures with Encode Style Image, connect some of anything else to neutral_pictures, or "
                "switch gap_correction off.",
            )
        n = (neutral.image_embeds if neutral is not None else empty).float().cpu()
    names = [f"content picture {i + 1}" for i in range(len(t))]
    return names, (t, t[:0], n), f"{tower.name if tower else 'the encoder of style'} alone, without a text encoder"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
