"""LoRA Stack."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..weights.errors import StyleLoomError
from .guidance_inputs import percent_input
from .host.guidance.entries import Entries, entries_of
from .host.lora_stack import from_hooks, from_tuples, to_tuples
from .types import CATEGORY_LORA, LoRA, LoRAStack, PackLoRAStack


class LoRAStackNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoRAStack",
            display_name="LoRA Stack",
            category=CATEGORY_LORA,
            description="Several LoRAs for one side of guidance, each with its own strength, its own part of sampling "
            "and its own region of the picture. Chain one node per LoRA.",
            search_aliases=[
                "multiple loras",
                "chain lora",
                "lora schedule",
                "lora stacker",
                "regional lora",
                "lora mask",
            ],
            inputs=[
                LoRA.Input(
                    "lora",
                    optional=True,
                    tooltip="The LoRA that this node adds. May be left out where lora_stack or hooks has the LoRAs.",
                ),
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
                    tooltip="Strength from step to step, from ComfyUI's Create Hook Keyframe nodes; it multiplies with "
                    "strength.",
                ),
                PackLoRAStack.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="The LORA_STACK of another pack's LoRA stacker: files in models/loras, with strengths.",
                ),
                io.Hooks.Input(
                    "hooks",
                    optional=True,
                    tooltip="LoRAs from ComfyUI's Create Hook LoRA, with their strengths and keyframes.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The LoRA acts where this mask is white, with soft edges, in the same pass as all others. "
                    "One mask for all pictures, or one for each picture or frame. Left out: everywhere.",
                ),
                io.Combo.Input(
                    "text_tokens",
                    options=["none", "whole"],
                    default="none",
                    optional=True,
                    advanced=True,
                    tooltip="With a mask: text, reference pictures and time have no place in the picture; what do they "
                    "get of this LoRA? none: nothing, so it stays in its region. whole: all of it, which is stronger "
                    "and shows outside as well.",
                ),
            ],
            outputs=[
                LoRAStack.Output(
                    display_name="stack",
                    tooltip="For positive_lora or negative_lora of Asymmetric CFG Sampler and Guider, or the next LoRA "
                    "Stack.",
                ),
                PackLoRAStack.Output(
                    display_name="lora_stack",
                    tooltip="The same for nodes of other packs: files with strengths. Where a LoRA is no file, or has "
                    "a window, keyframes or a mask, the node connected here does not run, and ComfyUI says why.",
                ),
                io.String.Output(
                    display_name="report", tooltip="The LoRAs in their order, and what lora_stack cannot say of them."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        strength,
        lora=None,
        stack=(),
        start_percent=0.0,
        end_percent=1.0,
        keyframes=None,
        lora_stack=None,
        hooks=None,
        mask=None,
        text_tokens="none",
    ) -> io.NodeOutput:
        made: Entries = ()
        for given, name in ((from_tuples(lora_stack), "lora_stack"), (from_hooks(hooks), "hooks"), (lora, "lora")):
            made += entries_of(given, strength, start_percent, end_percent, name, mask)
        if mask is not None:
            made = tuple(dataclasses.replace(entry, text_tokens=text_tokens) for entry in made)
        whole = (*stack, *(_with_keyframes(entry, keyframes) for entry in made))
        tuples, why = to_tuples(whole)
        report = "\n".join([*_lines(whole), *([f"lora_stack cannot be used: {why}."] if why else [])])
        return io.NodeOutput(
            whole, ExecutionBlocker(f"LoRA Stack: {why}.") if why else tuples, report, ui=ui.PreviewText(report)
        )


def _with_keyframes(entry, keyframes):
    if keyframes is None:
        return entry
    if entry.keyframes is not None:
        raise StyleLoomError(
            f"{entry.name} in hooks has keyframes of its own, and keyframes is connected as well",
            "one of the two",
            "Disconnect keyframes, or take the keyframes off the hook.",
        )
    return dataclasses.replace(entry, keyframes=keyframes)


def _lines(entries: Entries) -> list[str]:
    lines = []
    for number, entry in enumerate(entries, 1):
        line = f"LoRA {number}: {entry.name or 'without a file'} at strength {entry.strength:g}"
        if (entry.start_percent, entry.end_percent) != (0.0, 1.0):
            line += f", {entry.start_percent:g} to {entry.end_percent:g} of sampling"
        if entry.keyframes is not None:
            line += ", with keyframes"
        if entry.masks:
            line += ", in the region of its mask"
        if entry.strength_clip is not None:
            line += f" ({entry.strength_clip:g} for a text encoder, which a sampler cannot change any more)"
        lines.append(line)
    return lines or ["no LoRA"]
