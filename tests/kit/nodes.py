"""The kit's nodes. They are loaded by run.py and the tests only."""

from __future__ import annotations

from comfy_api.latest import io

from . import architectures

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
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, control_after_generate=False,
                             tooltip="Decides every weight; the same seed gives the same model."),
            ],
            outputs=[io.Model.Output(display_name="model"), io.Clip.Output(display_name="clip"),
                     io.Vae.Output(display_name="vae")],
        )

    @classmethod
    def execute(cls, architecture: str, seed: int) -> io.NodeOutput:
        return io.NodeOutput(*architectures.make(architecture, seed))


NODES = [KitModel]
