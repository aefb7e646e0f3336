"""ZipRank Merge: a content LoRA and a style LoRA become one."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..weights.merge.priors import OPTIONS as PRIORS
from .host.progress import Steps
from .host.merge.ziprank_run import MODES, ZipRank
from .types import CATEGORY_LORA, LoRA


class ZipRankMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomZipRankMerge",
            display_name="ZipRank Merge",
            category=CATEGORY_LORA,
            description="Merges a content LoRA and a style LoRA into one. Where the two want different things of the "
            "same inputs, masks over their ranks decide; where they do not meet, both stay whole. Fast mode needs "
            "nothing but the two files.",
            search_aliases=["merge lora", "ziplora", "duolora", "combine loras", "content style", "zip rank"],
            inputs=[
                LoRA.Input("content_lora", tooltip="The LoRA of the subject, from Load LoRA File."),
                LoRA.Input("style_lora", tooltip="The LoRA of the style, for the same base model."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="fast: from the two files alone, in seconds. calibrated: looks at what the layers of the "
                    "model see for your two prompts (needs model and clip, no pictures). train: learns the masks "
                    "through the model (minutes on a GPU).",
                ),
                io.Float.Input(
                    "separation",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 is the same as loading both LoRAs one after the other. 1 keeps them apart as far as "
                    "possible: each acts on its own subject matter only. In mode train it sets the start. A block that "
                    "the prior gives to one LoRA alone is not touched by it.",
                ),
                io.Float.Input(
                    "content_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Scales the content LoRA before the merge.",
                ),
                io.Float.Input(
                    "style_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Scales the style LoRA before the merge.",
                ),
                io.Combo.Input(
                    "prior",
                    options=list(PRIORS),
                    default=PRIORS[0],
                    tooltip="Which blocks of SDXL speak for content and which for style; it decides only where the "
                    "two LoRAs conflict. soft: a gentle weight. duolora: as in the paper. b-lora: two blocks are "
                    "given to one LoRA alone, whatever the separation. none: all alike. custom: what you write in "
                    "custom_prior.",
                ),
                io.Int.Input(
                    "max_rank",
                    default=0,
                    min=0,
                    max=2048,
                    tooltip="0 keeps everything that the masks leave. Another number gives the best approximation of "
                    "that rank, and a smaller file.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model. Matches the names of both LoRAs, of any architecture; without it SDXL is "
                    "known. Needed for calibrated and train. It is not changed.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the model: for the prompts, and for LoRAs that train it.",
                ),
                io.String.Input(
                    "content_prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="calibrated and train: a prompt for the content LoRA, with its trigger word. A line each "
                    "for several prompts.",
                ),
                io.String.Input(
                    "style_prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="calibrated and train: a prompt for the style LoRA, with its trigger word. A line each for "
                    "several prompts.",
                ),
                io.Int.Input(
                    "steps",
                    default=60,
                    min=1,
                    max=10000,
                    optional=True,
                    tooltip="train: how often the masks are corrected. 60 to 100 is usual.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.01,
                    min=0.00001,
                    max=1.0,
                    step=0.001,
                    round=0.00001,
                    optional=True,
                    tooltip="train: how far a mask moves in a step.",
                ),
                io.Latent.Input(
                    "content_latents",
                    optional=True,
                    tooltip="calibrated and train: pictures of the subject from VAE Encode. Without them the content "
                    "LoRA makes its own.",
                ),
                io.Latent.Input(
                    "style_latents",
                    optional=True,
                    tooltip="calibrated and train: pictures of the style from VAE Encode. Without them the style LoRA "
                    "makes its own.",
                ),
                io.Float.Input(
                    "cycle_weight",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="train: weight of the Constyle cycle (add the style, take it away, the content must come "
                    "back, and the other way round). 0, the default, leaves it out, and with it half of what DuoLoRA "
                    "is; DuoLoRA uses 0.01. Doubles the time.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    optional=True,
                    tooltip="calibrated and train: the noise of the pictures that the LoRAs make and are asked about.",
                ),
                io.String.Input(
                    "custom_prior",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="For the prior custom: content and style weight of blocks, as JSON (see help).",
                ),
                io.Boolean.Input(
                    "keep_strength",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Raises the masks of a layer, by a quarter at most, where the two LoRAs have weakened each "
                    "other.",
                ),
                io.Combo.Input(
                    "solver",
                    options=["masks", "router"],
                    default="masks",
                    optional=True,
                    advanced=True,
                    tooltip="calibrated: masks, one number for each rank; router: a whole matrix between the ranks, "
                    "which fits better and may exaggerate.",
                ),
                io.Int.Input(
                    "calibration_steps",
                    default=4,
                    min=1,
                    max=50,
                    optional=True,
                    advanced=True,
                    tooltip="calibrated: at how many noise levels each LoRA is looked at. train: steps of the "
                    "pictures that the LoRAs make.",
                ),
                io.Int.Input(
                    "size",
                    default=1024,
                    min=64,
                    max=4096,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="calibrated and train: side in pixels of the pictures that the LoRAs make.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=0.1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="train: weight of the layer prior (the LoRA that should step back in a block must not "
                    "keep more than the other).",
                ),
            ],
            outputs=[
                LoRA.Output(display_name="lora", tooltip="For Apply LoRA, Save LoRA File and ComfyUI's own nodes."),
                io.String.Output(
                    display_name="report",
                    tooltip="What was merged, how much of each is left, and what to look out for.",
                ),
                io.Image.Output(
                    display_name="masks",
                    tooltip="A heat map: how much of the content and of the style is kept in each layer of each block.",
                ),
            ],
        )

    @classmethod
    def execute(cls, content_lora, style_lora, mode, model=None, clip=None, **settings) -> io.NodeOutput:
        work = ZipRank(content_lora, style_lora, model, clip, mode, settings)
        work.prepare(Steps)
        lora, report, picture = work.run()
        for line in work.merged.warnings:
            logging.warning("StyleLoom: %s", line)
        return io.NodeOutput(lora, report, picture)
