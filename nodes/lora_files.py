"""Load LoRA File, Save LoRA File, Apply LoRA."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..weights.lora.files import PRECISIONS, save_lora
from .host import folders
from .host.apply_lora import apply_lora
from .host.lora_file import load_lora_file, said_of_itself
from .host.missing_keys import ERROR
from .shared_inputs import missing_keys_input
from .types import CATEGORY_LORA, LoRA


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoadLoRA",
            display_name="Load LoRA File",
            category=CATEGORY_LORA,
            description="Reads a LoRA file without applying it to a model: for nodes that work on the LoRA itself.",
            search_aliases=["lora model", "open lora", "i2l bias", "trigger words", "lora metadata"],
            inputs=[
                folders.FileInput(
                    "lora_name",
                    folders.LORAS,
                    tooltip="A LoRA file in models/loras or output/loras, of any format that ComfyUI reads.",
                )
            ],
            outputs=[
                LoRA.Output(
                    display_name="lora",
                    tooltip="For Apply LoRA, Image-to-LoRA Predictor (bias_lora), and ComfyUI's Load LoRA Model.",
                ),
                io.String.Output(
                    display_name="trigger_words",
                    tooltip="Words that call for the LoRA, with commas between; nothing where the file names none.",
                ),
                io.String.Output(
                    display_name="base_model",
                    tooltip="What it was trained on: as the file says, else by the names and sizes of its layers.",
                ),
                io.String.Output(display_name="report", tooltip="What the file says of itself."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name):
        return folders.state(folders.LORAS, lora_name)

    @classmethod
    def execute(cls, lora_name) -> io.NodeOutput:
        lora = load_lora_file(lora_name)
        words, base, report = said_of_itself(lora)
        return io.NodeOutput(lora, words, base, report, ui=ui.PreviewText(report))


class SaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomSaveLoRA",
            display_name="Save LoRA File",
            category=CATEGORY_LORA,
            description="Writes a LoRA to the output folder, with the recipe that made it in its metadata.",
            search_aliases=["export lora", "save lora"],
            is_output_node=True,
            inputs=[
                LoRA.Input("lora", tooltip="The LoRA to write."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/styleloom",
                    tooltip="Name under the output folder; a number is added. What lies in output/loras, "
                    "ComfyUI's LoRA loaders list.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="as it is",
                    tooltip="as it is: the LoRA's own. bf16 and fp16 halve an fp32 LoRA; fp32 doubles a smaller one "
                    "and adds nothing.",
                ),
            ],
            outputs=[io.String.Output(display_name="saved path", tooltip="Relative to the output folder.")],
        )

    @classmethod
    def execute(cls, lora, filename_prefix, precision) -> io.NodeOutput:
        path, shown = folders.save_path(filename_prefix)
        save_lora(path, lora, getattr(lora, "metadata", {}), precision)
        return io.NodeOutput(shown, ui=ui.PreviewText(f"LoRA saved as {shown}"))


class ApplyLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomApplyLoRA",
            display_name="Apply LoRA",
            category=CATEGORY_LORA,
            description="Patches a model with a LoRA, like ComfyUI's Load LoRA Model, but stops when any part of the "
            "LoRA finds no place in the model instead of leaving it out. Acts on both sides of guidance; for one side "
            "only, as Z-Image-i2L was published, use Asymmetric CFG Sampler.",
            search_aliases=["lora model", "load lora", "patch model"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model; the one given stays as it is."),
                LoRA.Input("lora", tooltip="From Image-to-LoRA Predictor or Load LoRA File."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Scales the change that the LoRA makes. 0 leaves the model as it is.",
                ),
                io.Clip.Input(
                    "clip", optional=True, advanced=True, tooltip="For LoRAs with parts for the text encoder."
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="The same for the text encoder.",
                ),
                missing_keys_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A patched clone."),
                io.Clip.Output(display_name="clip", tooltip="A patched clone, or nothing where no clip was given."),
                io.String.Output(
                    display_name="report", tooltip="How many weights are patched, and what was left out."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, lora, strength, clip=None, strength_clip=1.0, missing_keys=ERROR) -> io.NodeOutput:
        return io.NodeOutput(*apply_lora(model, clip, lora, strength, strength_clip, missing_keys))
