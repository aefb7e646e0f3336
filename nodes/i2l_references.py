"""Save References and Load References: a style as a small file."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..weights.i2l.references import load_references, save_references
from .host import folders
from .types import CATEGORY, References


class SaveReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomSaveReferences",
            display_name="Save References",
            category=CATEGORY,
            description="Writes encoded reference pictures to output/i2l_references: about 11 kB a picture (10 MB "
            "with the residuals of Coarse and Fine). Whoever has the file needs neither pictures nor encoders.",
            search_aliases=["save embeddings", "save style", "i2l"],
            is_output_node=True,
            inputs=[
                References.Input("references", tooltip="From Encode References."),
                io.String.Input(
                    "filename_prefix",
                    default="style",
                    tooltip="Name of the file under output/i2l_references; a number is added.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, references, filename_prefix) -> io.NodeOutput:
        path, shown = folders.save_path(filename_prefix, inside=folders.REFERENCES)
        save_references(path, references)
        return io.NodeOutput(ui=ui.PreviewText(f"{len(references)} references saved as {shown}"))


class LoadReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoadReferences",
            display_name="Load References",
            category=CATEGORY,
            description="Reads encoded reference pictures from a file that Save References wrote; needs neither "
            "pictures nor encoders.",
            search_aliases=["load embeddings", "load style", "i2l"],
            inputs=[
                folders.FileInput(
                    "references_name",
                    folders.REFERENCES,
                    tooltip="A file written by Save References, in models/i2l_references or output/i2l_references.",
                ),
            ],
            outputs=[References.Output(display_name="references", tooltip="For Image-to-LoRA Predictor.")],
        )

    @classmethod
    def fingerprint_inputs(cls, references_name):
        return folders.state(folders.REFERENCES, references_name)

    @classmethod
    def execute(cls, references_name) -> io.NodeOutput:
        return io.NodeOutput(load_references(folders.find(folders.REFERENCES, references_name)))
