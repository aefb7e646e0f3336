"""Content Subtract."""

from __future__ import annotations

from comfy_api.latest import io

from ..weights.clip_space.subtract import DIRECTIONAL, METHODS, NEUTRAL, Options, describe, subtract
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
            description="Takes what you name out of an encoded picture, so that its style is left. For base "
            "IP-Adapters, unCLIP and whatever reads the picture's one vector. Plus adapters read patches, which no "
            "text describes: for them, connect a picture of the content to negative of Style Block Injector.",
            search_aliases=["instantstyle", "neg content", "remove content", "content leakage", "concept subtraction"],
            inputs=[
                io.ClipVisionOutput.Input("style", tooltip="The encoded picture or pictures."),
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder that was trained with the image encoder: an SDXL checkpoint's for "
                    "ViT-bigG; for ViT-H the text encoder of OpenCLIP ViT-H. Others are refused.",
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
        clip,
        content,
        method,
        strength,
        protect="",
        gap_correction=True,
        one_sided=True,
        renormalise=False,
    ) -> io.NodeOutput:
        concepts, kept = _lines(content), _lines(protect)
        if not concepts:
            raise StyleLoomError(
                "content is empty", "what is to be taken out, one concept a line", "Write for example: a cat"
            )
        options = Options(method, strength, gap_correction, one_sided, renormalise)
        tower = find_tower(clip, sizes(style, "style"))
        neutral = list(NEUTRAL) if gap_correction and method in DIRECTIONAL else []
        vectors = text_vectors(clip, tower, concepts + kept + neutral)
        t, s, n = vectors.split([len(concepts), len(kept), len(neutral)])
        z = style.image_embeds
        changed = subtract(z.cpu(), t, options, s, n).to(z.device)
        report = describe(z.cpu(), changed.cpu(), t, concepts, options, tower.pair)
        return io.NodeOutput(with_embeds(style, changed, f"{method}: {', '.join(concepts)}"), report)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
