"""Redux by Blocks."""

from __future__ import annotations

from comfy_api.latest import io

from ..weights.dit.redux import PRESETS, strengths
from ..weights.errors import StyleLoomError
from ..weights.unet import presets
from .host.style.redux import ReduxBlocks, append, check_model, make_tokens
from .host.style.report import redux_report
from .types import CATEGORY_STYLE


class ReduxByBlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomReduxBlocks",
            display_name="Redux by Blocks",
            category=CATEGORY_STYLE,
            description="FLUX.1 Redux like ComfyUI's Apply Style Model, but only chosen blocks see the picture: those "
            "of style, so that less of its content comes along, or those of layout.",
            search_aliases=["redux", "apply style model", "flux style", "siglip", "style only", "style transfer"],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.1 model."),
                io.Conditioning.Input(
                    "conditioning", tooltip="The encoded prompt; behind FluxGuidance or before it. Mostly the positive."
                ),
                io.StyleModel.Input("style_model", tooltip="From Load Style Model: flux1-redux-dev."),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    tooltip="The picture, encoded with sigclip_vision_patch14_384 by Encode Style Image or CLIP Vision "
                    "Encode. A batch counts as several pictures.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of the picture the chosen blocks see, as attn_bias in Apply Style Model. 1 is "
                    "as trained; 0 is nothing. Redux is strong: try 0.3 too.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=presets.STYLE,
                    tooltip="Which blocks see the picture. style: single 10 to 37. layout: single 0 to 9. all: every "
                    "one, as Redux itself. custom: those in block_weights.",
                ),
                io.String.Input(
                    "block_weights",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For preset custom; each multiplies strength. For example: double 0-18: 0.2, single "
                    "10-37: 1. Blocks that are not named see nothing of the picture.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="A clone that restricts the picture, for the sampler. Use both outputs.",
                ),
                io.Conditioning.Output(display_name="conditioning", tooltip="The prompt with the picture behind it."),
                io.String.Output(display_name="report", tooltip="How many tokens, and which blocks see them."),
            ],
        )

    @classmethod
    def execute(
        cls, model, conditioning, style_model, clip_vision_output, strength, preset, block_weights=""
    ) -> io.NodeOutput:
        check_model(model)
        if not conditioning:
            raise StyleLoomError("conditioning is empty", "an encoded prompt", "Connect CLIP Text Encode.")
        seen = strengths(preset, strength, block_weights)
        tokens = make_tokens(style_model, clip_vision_output, conditioning[0][0].shape[-1])
        made = append(conditioning, tokens)
        pictures = len(clip_vision_output.last_hidden_state)
        report = redux_report(preset, seen, len(tokens), pictures, bool(block_weights.strip()))
        return io.NodeOutput(ReduxBlocks(tokens, seen).install(model), made, report)
