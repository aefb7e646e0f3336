"""LoRA Block Filter."""

from __future__ import annotations

from comfy_api.latest import io

from ..weights.lora.block_filter import PRESETS, filter_blocks
from .types import CATEGORY_LORA, LoRA


class LoRABlockFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoRABlockFilter",
            display_name="LoRA Block Filter",
            category=CATEGORY_LORA,
            description="Restricts a LoRA to the layers that make style, content or layout, or to layers that you "
            "name. A style LoRA that also brings its training subjects along keeps its style this way.",
            search_aliases=["lora block weight", "b-lora", "lora layers", "style lora", "lbw", "flux blocks"],
            inputs=[
                LoRA.Input("lora", tooltip="From Load LoRA File or another node that gives a LoRA."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=PRESETS[0],
                    tooltip="Which layers are inside. Style blocks, content blocks and layout are known for SDXL, "
                    "style and layout for SD1.5, style and content blocks for FLUX.1, there also without the two "
                    "blocks at the border. Attention only and custom patterns work for every model.",
                ),
                io.Float.Input(
                    "inside",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength of the LoRA inside. 0 leaves these layers out.",
                ),
                io.Float.Input(
                    "outside",
                    default=0.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength everywhere else, the text encoder included. 0 leaves these layers out.",
                ),
                io.String.Input(
                    "patterns",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Only for custom patterns: parts of layer names, one a line, for example "
                    "up_blocks.0.attentions.1. A star stands for anything.",
                ),
            ],
            outputs=[
                LoRA.Output(display_name="lora", tooltip="For Apply LoRA, Save LoRA File, or another filter."),
                io.String.Output(display_name="report", tooltip="How many layers are inside and outside."),
            ],
        )

    @classmethod
    def execute(cls, lora, preset, inside, outside, patterns="") -> io.NodeOutput:
        result = filter_blocks(lora, preset, inside, outside, patterns)
        return io.NodeOutput(result.lora, result.report)
