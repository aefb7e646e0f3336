"""Load i2L Predictor, and the Image-to-LoRA Predictor itself."""

from __future__ import annotations

import json
import logging

from comfy_api.latest import io

from ..weights.i2l import predict
from ..weights.i2l.decode import ARITHMETICS
from ..weights.i2l.predict import open_predictor
from ..weights.lora.lora_model import to_lora_model
from .host import folders
from .host.progress import Steps
from .types import CATEGORY, LoRA, Predictor, References


class LoadPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoadPredictor",
            display_name="Load i2L Predictor",
            category=CATEGORY,
            description="Opens an Image-to-LoRA predictor (Z-Image-i2L, Z-Image-Omni-Base-i2L, Qwen-Image-i2L Style, "
            "Coarse or Fine). The header of the file says which one it is; the weights stay in the file until they are "
            "used.",
            search_aliases=["i2l", "image to lora", "z-image-i2l", "qwen-image-i2l", "style predictor"],
            inputs=[
                folders.FileInput(
                    "predictor_name",
                    folders.PREDICTORS,
                    tooltip="A predictor file in models/i2l (or models/I2L, models/z_image_i2l, "
                    "models/DiffSynth-Studio). It must belong to the base model that will make the picture. "
                    "Z-Image-i2L and Z-Image-Omni-Base-i2L look alike: only you know which is which.",
                    mark=".proj_a.proj_in.",
                ),
            ],
            outputs=[Predictor.Output(display_name="predictor", tooltip="For Image-to-LoRA Predictor.")],
        )

    @classmethod
    def fingerprint_inputs(cls, predictor_name):
        return folders.state(folders.PREDICTORS, predictor_name)

    @classmethod
    def execute(cls, predictor_name) -> io.NodeOutput:
        predictor = open_predictor(folders.find(folders.PREDICTORS, predictor_name), predictor_name)
        logging.info("StyleLoom: %s is %s", predictor_name, predictor.recognised.label)
        if predictor.recognised.warning:
            logging.warning("StyleLoom: %s: %s", predictor_name, predictor.recognised.warning)
        return io.NodeOutput(predictor)


class ImageToLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomImageToLoRA",
            display_name="Image-to-LoRA Predictor",
            category=CATEGORY,
            description="Turns encoded reference pictures into one LoRA, in one forward pass and without training. "
            "Several pictures are fused: their LoRAs are averaged exactly, by concatenating ranks.",
            search_aliases=["i2l", "image to lora", "img2lora", "style transfer", "style lora", "reference", "lora"],
            inputs=[
                Predictor.Input(
                    "predictor",
                    tooltip="From Load i2L Predictor. For Qwen-Image's Coarse + Fine, the Coarse one goes here.",
                ),
                References.Input("references", tooltip="From Encode References or Load References."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Scales the change that the LoRA makes, once (twice the strength is twice the "
                    "change). 1 is as published. Multiplies with the strength of Apply LoRA.",
                ),
                Predictor.Input(
                    "predictor_fine",
                    optional=True,
                    tooltip="Qwen-Image-i2L Fine, whose LoRA is added to that of Coarse.",
                ),
                io.String.Input(
                    "image_weights",
                    default="",
                    optional=True,
                    tooltip="One number per reference picture, for example: 1, 0.5, 2. They are made to "
                    "sum to 1. Empty: all alike, as published. 0 leaves a picture out.",
                ),
                io.Int.Input(
                    "max_rank",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    tooltip="0 keeps the exact sum: rank 4 per picture and predictor, plus that of "
                    "bias_lora. A smaller number gives the best approximation of that rank, and a smaller "
                    "file.",
                ),
                io.Combo.Input(
                    "arithmetic",
                    options=list(ARITHMETICS),
                    default=ARITHMETICS[0],
                    optional=True,
                    advanced=True,
                    tooltip="reference: bf16, with the roundings of the publication. fp32: no rounding, a "
                    "little slower, a LoRA twice as large.",
                ),
                LoRA.Input(
                    "bias_lora",
                    optional=True,
                    advanced=True,
                    tooltip="Qwen-Image-i2L-Bias, from Load LoRA File: becomes part of the LoRA, as published "
                    "for Coarse + Fine + Bias. Scaled by strength too.",
                ),
            ],
            outputs=[
                LoRA.Output(
                    display_name="lora",
                    tooltip="For Apply LoRA, Save LoRA File, and ComfyUI's own Load LoRA Model and Save LoRA Weights.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was made from which files and pictures: targets, rank, norms, warnings.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        predictor,
        references,
        strength,
        predictor_fine=None,
        image_weights="",
        max_rank=0,
        arithmetic=ARITHMETICS[0],
        bias_lora=None,
    ) -> io.NodeOutput:
        steps = Steps(predict.step_count(predictor, predictor_fine))
        result = predict.predict_lora(
            predictor,
            references,
            strength=strength,
            fine=predictor_fine,
            image_weights=image_weights,
            max_rank=max_rank,
            arithmetic=arithmetic,
            bias=bias_lora,
            on_step=steps,
        )
        for line in result.warnings:
            logging.warning("StyleLoom: %s", line)
        lora = to_lora_model(result.factors, {"styleloom.recipe": json.dumps(result.recipe, sort_keys=True)})
        return io.NodeOutput(lora, result.report)
