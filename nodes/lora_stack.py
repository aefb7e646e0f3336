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
            description="Several LoRAs for one side of guidance, each with its own strength and its own part of "
            "sampling. Chain one node per LoRA.",
            search_aliases=["multiple loras", "chain lora", "lora schedule"],
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
    def execute(cls, lora, strength, stack=(), start_percent=0.0, end_percent=1.0, keyframes=None) -> io.NodeOutput:
        made = entries_of(lora, strength, start_percent, end_percent, "lora")
        return io.NodeOutput((*stack, *(dataclasses.replace(entry, keyframes=keyframes) for entry in made)))
