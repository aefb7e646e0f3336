"""The kit's nodes. They are loaded by run.py and the tests only."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from . import architectures, compare, diffusion, lora_picture, pictures, vision

CATEGORY = "StyleLoom/kit"


class KitModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleLoomKitModel",
            display_name="Kit: Small Model",
            category=CATEGORY,
            description="A seeded, untrained model of a true architecture at small width, for tests and demos: real "
                        "layer counts, names and text template, abstract pictures.",
            inputs=[
                io.Combo.Input("architecture", options=list(architectures.ARCHITECTURES),
                               tooltip="Which diffusion model to make, with its text encoder and VAE."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1,
                             tooltip="Decides every weight; the same seed gives the same model."),
            ],
            outputs=[io.Model.Output(display_name="model"), io.Clip.Output(display_name="clip"),
                     io.Vae.Output(display_name="vae")],
        )

    @classmethod
    def execute(cls, architecture: str, seed: int) -> io.NodeOutput:
        return io.NodeOutput(*architectures.make(architecture, seed))


class KitVision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleLoomKitVision",
            display_name="Kit: Small CLIP Vision",
            category=CATEGORY,
            description="A seeded, untrained CLIP image encoder with the real preprocessing and number of tokens, whose "
                        "vectors are as long as those of the small SDXL's larger text encoder.",
            inputs=[io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Decides every weight.")],
            outputs=[io.ClipVision.Output(display_name="clip_vision")],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        with torch.inference_mode(False):
            return io.NodeOutput(vision.clip_vision_small(seed, diffusion.SDXL_CLIP_G))


class KitPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleLoomKitPictures",
            display_name="Kit: Template Pictures",
            category=CATEGORY,
            description="A real picture out of those that come with the host's workflow templates, read in place.",
            inputs=[io.Combo.Input("name", options=list(pictures.SUBJECTS),
                                   tooltip="What is on the picture. Sizes differ from picture to picture.")],
            outputs=[io.Image.Output(display_name="image"),
                     io.String.Output(display_name="file", tooltip="The name of the file that was read.")],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        image, path = pictures.load(name)
        return io.NodeOutput(image, path.name)


class KitLoRAPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleLoomKitLoRAPicture",
            display_name="Kit: Picture of a LoRA",
            category=CATEGORY,
            description="Draws a LoRA's targets, rank and the size of each change as a heat map.",
            inputs=[io.LoraModel.Input("lora", tooltip="A LoRA on a wire, for instance from Image-to-LoRA Predictor.")],
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="text")],
        )

    @classmethod
    def execute(cls, lora: dict[str, torch.Tensor]) -> io.NodeOutput:
        picture, text = lora_picture.draw(lora)
        return io.NodeOutput(lora_picture.to_image(picture), text, ui=ui.PreviewText(text))


class KitCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleLoomKitCompare",
            display_name="Kit: How Much It Moved",
            category=CATEGORY,
            description="Two pictures and their difference side by side, and the difference in numbers.",
            inputs=[
                io.Image.Input("image_a", tooltip="The picture before."),
                io.Image.Input("image_b", tooltip="The picture after; it must have the same size."),
            ],
            outputs=[io.Image.Output(display_name="image"), io.String.Output(display_name="text")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_a: torch.Tensor, image_b: torch.Tensor) -> io.NodeOutput:
        sheet, text = compare.draw(image_a, image_b)
        return io.NodeOutput(sheet, text, ui=ui.PreviewText(text))


NODES = [KitModel, KitVision, KitPictures, KitLoRAPicture, KitCompare]
