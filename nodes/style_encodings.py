"""Save Style Encoding and Load Style Encoding: encoded pictures as a file."""

from __future__ import annotations

import comfy.clip_vision
import torch
from comfy_api.latest import io, ui

from ..weights.errors import StyleLoomError
from ..weights.ip_adapter.encodings import EMBEDS, HIDDEN, Encoding, load_encoding, save_encoding
from .host import folders
from .types import CATEGORY_STYLE


class SaveStyleEncoding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomSaveStyleEncoding",
            display_name="Save Style Encoding",
            category=CATEGORY_STYLE,
            description="Writes encoded pictures to output/style_encodings. Whoever has the file needs neither the "
            "pictures nor the image encoder.",
            search_aliases=["save embeds", "ipadapter save embeds", "share style", "ipadpt"],
            is_output_node=True,
            inputs=[
                io.ClipVisionOutput.Input("encoded", tooltip="From Encode Style Image or Content Subtract."),
                io.String.Input(
                    "filename_prefix",
                    default="style",
                    tooltip="Name of the file under output/style_encodings; a number is added.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, encoded, filename_prefix) -> io.NodeOutput:
        embeds, hidden, empty = (getattr(encoded, name, None) for name in (EMBEDS, HIDDEN, "styleloom_empty"))
        if not any(isinstance(t, torch.Tensor) for t in (embeds, hidden)) or (embeds is not None and embeds.ndim != 2):
            raise StyleLoomError(
                "encoded was made by an encoder without a projected image vector (SigLIP, DINO)",
                "the output of a CLIP encoder (ViT-H, ViT-bigG, ViT-L)",
                "Encode the picture with such an encoder.",
            )
        encoding = Encoding(embeds, hidden, empty, getattr(encoded, "styleloom_subtracted", None) or "")
        path, shown = folders.save_path(filename_prefix, inside=folders.STYLE_ENCODINGS)
        save_encoding(path, encoding)
        return io.NodeOutput(ui=ui.PreviewText(f"{len(encoding)} encoded by {encoding.encoder}, saved as {shown}"))


class LoadStyleEncoding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoadStyleEncoding",
            display_name="Load Style Encoding",
            category=CATEGORY_STYLE,
            description="Reads encoded pictures that Save Style Encoding wrote, or an .ipadpt file of IPAdapter Plus.",
            search_aliases=["load embeds", "ipadapter load embeds", "ipadpt"],
            inputs=[
                folders.FileInput(
                    "encoding_name",
                    folders.STYLE_ENCODINGS,
                    tooltip="A file in models/style_encodings or output/style_encodings.",
                ),
            ],
            outputs=[
                io.ClipVisionOutput.Output(
                    display_name="encoded", tooltip="For Style Block Injector and Content Subtract."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, encoding_name):
        return folders.state(folders.STYLE_ENCODINGS, encoding_name)

    @classmethod
    def execute(cls, encoding_name) -> io.NodeOutput:
        found = load_encoding(folders.find(folders.STYLE_ENCODINGS, encoding_name))
        output = comfy.clip_vision.Output()
        parts = {EMBEDS: found.embeds, HIDDEN: found.hidden, "styleloom_empty": found.empty}
        for name, value in parts.items():
            if value is not None:
                output[name] = value
        if found.subtracted:
            output["styleloom_subtracted"] = found.subtracted
        if found.embeds is None or found.hidden is None:
            output["styleloom_only"] = HIDDEN if found.embeds is None else EMBEDS
        return io.NodeOutput(output)
