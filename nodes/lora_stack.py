"""LoRA Stack."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from .guidance_inputs import percent_input
from .host.guidance.entries import entries_of
from .types import CATEGORY_LORA, LoRA, LoRAStack


class LoRAStackNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoRAStack",
            display_name="LoRA Stack",
            category=CATEGORY_LORA,
            description="Several LoRAs for one side of guidance, each with its own strength, its own part of "
            "sampling and its own region of the picture. Chain one node per LoRA.",
            search_aliases=["multiple loras", "chain lora", "lora schedule", "regional lora", "lora mask", "area lora"],
            inputs=[
                LoRA.Input("lora", tooltip="The LoRA that this node adds."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Scales the change that it makes.",
                ),
                LoRAStack.Input("stack", optional=True, tooltip="The LoRAs before this one."),
                percent_input("start_percent", 0.0, "It begins to act at this part of sampling."),
                percent_input("end_percent", 1.0, "It stops acting at this part of sampling."),
                io.HookKeyframes.Input(
                    "keyframes",
                    optional=True,
                    advanced=True,
                    tooltip="Strength from step to step, from ComfyUI's Create Hook Keyframe nodes; it multiplies.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The LoRA acts where this mask is white, with soft edges and in the same pass as all others. "
                    "One for all pictures, or one for each picture or frame. Left out: everywhere.",
                ),
                io.Combo.Input(
                    "text_tokens",
                    options=["none", "whole"],
                    default="none",
                    optional=True,
                    advanced=True,
                    tooltip="With a mask: what the layers get that have no place in the picture (text, reference "
                    "pictures, time). none: nothing of this LoRA, so it stays in its region. whole: all of it, which is "
                    "stronger and shows outside as well.",
                ),
            ],
            outputs=[
                LoRAStack.Output(
                    display_name="stack",
                    tooltip="For positive_lora or negative_lora of Asymmetric CFG Sampler and Guider, or the next LoRA "
                    "Stack.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, lora, strength, stack=(), start_percent=0.0, end_percent=1.0, keyframes=None, mask=None, text_tokens="none"
    ) -> io.NodeOutput:
        made = entries_of(lora, strength, start_percent, end_percent, "lora", mask)
        own = (dataclasses.replace(entry, keyframes=keyframes, text_tokens=text_tokens) for entry in made)
        return io.NodeOutput((*stack, *own))
