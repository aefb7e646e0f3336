"""Load IP-Adapter, Encode Style Image, Style Block Injector."""

from __future__ import annotations

import functools
import logging

import comfy.utils
from comfy_api.latest import io

from ..weights.dit import style_blocks
from ..weights.errors import StyleLoomError
from ..weights.unet import presets
from ..weights.ip_adapter.combine import parse_numbers, repeat_last
from ..weights.ip_adapter.dit_formats import DiTAdapter
from ..weights.ip_adapter.formats import recognise
from ..weights.ip_adapter.keys_values import BY_MASK, FUSIONS, SCALINGS
from ..weights.ip_adapter.siglip_head import PREFIX as SIGLIP_HEAD
from ..weights.tensor_file import read_header
from .host import folders
from .host.style.cross_attentions import check_fit
from .host.progress import Steps
from .host.style.dit_fit import check_settings
from .host.style.install import install
from .host.style.siglip_output import with_head
from .host.style.references import Tokens, masks_of, one_by_one
from .host.style.report import injection_report, injection_settings
from .host.style.step_weights import StepWeights
from .host.style.vision_output import FITS, POSITIONS, encode_picture, places
from .types import CATEGORY_STYLE, IPAdapter

MAX_INPUTS = 64
NO_FILE = "none"


class LoadIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomLoadIPAdapter",
            display_name="Load IP-Adapter",
            category=CATEGORY_STYLE,
            description="Opens an IP-Adapter for SDXL, SD1.5 or Kolors (base, light, plus, plus-face or full-face), "
            "FLUX.1 (XLabs, InstantX) or SD3.5-large (InstantX). What it is and which image encoder it needs is read "
            "from its contents, whatever its name. FaceID kinds are refused.",
            search_aliases=["ipadapter", "ip adapter", "instantstyle", "style transfer", "image prompt"],
            inputs=[
                folders.FileInput(
                    "ipadapter_name",
                    folders.IPADAPTERS,
                    tooltip="A file in models/ipadapter, .safetensors or .bin. For style: ip-adapter_sdxl_vit-h with "
                    "the ViT-H image encoder, or ip-adapter_sdxl with ViT-bigG.",
                    mark="to_k_ip.weight",
                ),
                folders.FileInput(
                    "siglip_head",
                    folders.VISION,
                    tooltip="Only for InstantX's FLUX.1 adapter: the file of the SigLIP encoder, for its pooling head, "
                    "which ComfyUI leaves out. model.safetensors of google/siglip-so400m-patch14-384.",
                    mark=SIGLIP_HEAD,
                    none=NO_FILE,
                ),
            ],
            outputs=[IPAdapter.Output(display_name="ipadapter", tooltip="For Style Block Injector.")],
        )

    @classmethod
    def fingerprint_inputs(cls, ipadapter_name, siglip_head=NO_FILE):
        return folders.state(folders.IPADAPTERS, ipadapter_name) + folders.state(folders.VISION, siglip_head)

    @classmethod
    def execute(cls, ipadapter_name, siglip_head=NO_FILE) -> io.NodeOutput:
        path = folders.find(folders.IPADAPTERS, ipadapter_name)
        if path.endswith((".safetensors", ".sft")):
            read_header(path)  # says what is wrong with a damaged file in better words than the library
        adapter = recognise(ipadapter_name, comfy.utils.load_torch_file(path, safe_load=True))
        logging.info("StyleLoom: %s is %s", ipadapter_name, adapter.label)
        if adapter.ignored:
            logging.warning(
                "StyleLoom: %s also has what no IP-Adapter of this kind needs, and it is left out: %s",
                ipadapter_name,
                ", ".join(adapter.ignored),
            )
        return io.NodeOutput(with_head(adapter, siglip_head) if siglip_head != NO_FILE else adapter)


class EncodeStyleImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StyleLoomEncodeStyleImage",
            display_name="Encode Style Image",
            category=CATEGORY_STYLE,
            description="Encodes pictures like ComfyUI's CLIP Vision Encode, without losing what lies outside the "
            "middle square, and brings along what plus adapters need for the negative side.",
            search_aliases=["clip vision encode", "style reference", "encode image", "ipadapter", "image embedding"],
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="From Load CLIP Vision: the encoder of your IP-Adapter."),
                io.Image.Input("image", tooltip="The picture or pictures whose style you want, of any size."),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="crop",
                    tooltip="The encoder sees squares. crop: one square, in the middle as published, or at position. "
                    "pad: the whole picture, smaller, with borders that the encoder takes for nothing. tiles: the "
                    "whole picture as several squares, each of which counts as a reference. tiled: as in IPAdapter "
                    "Plus, four quarters of a nearly square picture, else at most four squares in a row.",
                ),
                io.Combo.Input(
                    "position",
                    options=list(POSITIONS),
                    default=POSITIONS[0],
                    optional=True,
                    advanced=True,
                    tooltip="Only for crop: which square of the picture.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    advanced=True,
                    tooltip="What of the picture the encoder sees: white all, black nothing, which is its mean colour.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Multiplies the encoding itself, before the adapter reads it, as IPAdapter Encoder does.",
                ),
            ],
            outputs=[
                io.ClipVisionOutput.Output(
                    display_name="encoded",
                    tooltip="For Style Block Injector, Content Subtract, and whatever takes a CLIP vision output.",
                ),
                io.Mask.Output(
                    display_name="masks",
                    tooltip="Where each square lies, for mask of Style Block Injector with fusion one per mask.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip_vision, image, fit, position=POSITIONS[0], mask=None, weight=1.0) -> io.NodeOutput:
        encoded = encode_picture(clip_vision, image, fit, position, mask, weight)
        return io.NodeOutput(encoded, places(image, fit))


class StyleBlockInjector(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        style = io.Autogrow.TemplatePrefix(
            io.ClipVisionOutput.Input(
                "style",
                tooltip="An encoded picture whose style you want, from Encode Style Image, Content Subtract or "
                "ComfyUI's CLIP Vision Encode. A batch counts as several.",
            ),
            prefix="style",
            min=1,
            max=MAX_INPUTS,
        )
        return io.Schema(
            node_id="StyleLoomStyleBlockInjector",
            display_name="Style Block Injector",
            category=CATEGORY_STYLE,
            description="Gives a model the style of a picture, and not its content, by showing the picture only to the "
            "layers that make style (InstantStyle). The layers that make the layout can be shown the same picture, or "
            "another one.",
            search_aliases=["instantstyle", "ipadapter", "style transfer", "style only", "composition", "reference"],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL, SD1.5, Kolors, FLUX.1 or SD3.5-large model."),
                IPAdapter.Input("ipadapter", tooltip="From Load IP-Adapter."),
                io.Autogrow.Input(
                    "style",
                    template=style,
                    tooltip="Connect an encoded picture and another input appears. In the API: style.style0, …",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(presets.PRESETS),
                    default=presets.STYLE,
                    tooltip="Which layers see the picture. style: only those of style. layout: only those of layout. "
                    "all: every one, as IP-Adapter itself does. custom: those in block_weights. precise style: style, "
                    "and away from the picture's layout. precise layout: layout, and away from its style. IPAdapter "
                    "Plus: that pack's weight types.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How strongly the style acts; 0 is nothing. 1 is as published.",
                ),
                io.Float.Input(
                    "layout_weight",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    tooltip="The same for the layout, in preset style + layout, and in all when layout is connected.",
                ),
                io.ClipVisionOutput.Input(
                    "layout",
                    optional=True,
                    tooltip="Another encoded picture, for the layers of the layout. Without it they see the pictures "
                    "of style.",
                ),
                io.ClipVisionOutput.Input(
                    "negative",
                    optional=True,
                    tooltip="An encoded picture to move away from, for example of the content that leaks. Without it "
                    "the negative side sees an empty picture, as published.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the style acts: white everywhere, black nowhere. Any size."
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="When it begins to act: 0 is the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="When it ends: 1 is after the last step.",
                ),
                io.Combo.Input(
                    "scaling",
                    options=list(SCALINGS),
                    default=SCALINGS[0],
                    optional=True,
                    tooltip="V: the weight scales what the picture adds, as published. K+V: it also sharpens or "
                    "flattens where the layers look at the picture. by width: less in the narrow layers.",
                ),
                io.Combo.Input(
                    "fusion",
                    options=list(FUSIONS),
                    default=FUSIONS[0],
                    optional=True,
                    tooltip="Several pictures. concat: the layers choose between all of them. average: their mean. one "
                    "per picture: the first picture of a batch (or frame) gets the first, and so on. add, subtract, "
                    "norm average, max, min: made into one. one per mask: each acts in its own mask.",
                ),
                io.String.Input(
                    "block_weights",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For preset custom and the precise ones. For example: output 1: 1, input 8: 0.5. Blocks "
                    "have ComfyUI's names, those of diffusers (up_blocks.0.attentions.1), or IPAdapter Plus's numbers "
                    "(6). FLUX.1: double 3: 1, single 10-37: 0.5.",
                ),
                io.Float.Input(
                    "boost",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Only for the precise presets: how strongly the result moves away from the reference's "
                    "layout (precise style) or style (precise layout). 0 is not at all.",
                ),
                io.String.Input(
                    "reference_weights",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A weight for each reference, for example: 1, 0.5, 0.5. With one per picture: a weight for "
                    "each picture or frame, also from Style Weights. Empty: 1 for all.",
                ),
                io.String.Input(
                    "step_weights",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Weights over the schedule, from start_percent to end_percent with straight lines between "
                    "them, for example: 1, 0.5, 0. Also from Style Weights. Empty: 1 throughout.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A clone with the style, for the sampler."),
                io.String.Output(
                    display_name="report", tooltip="What acts where: adapter, encoder, layers, references, repeats."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        ipadapter,
        style,
        preset,
        weight,
        layout_weight=1.0,
        layout=None,
        negative=None,
        mask=None,
        start_percent=0.0,
        end_percent=1.0,
        scaling=SCALINGS[0],
        fusion=FUSIONS[0],
        block_weights="",
        boost=1.0,
        reference_weights="",
        step_weights="",
    ) -> io.NodeOutput:
        if start_percent > end_percent:
            raise StyleLoomError(
                f"start_percent is {start_percent:g} and end_percent {end_percent:g}",
                "a start before the end",
                "Swap them, or set 0 and 1.",
            )
        references = [style[name] for name in sorted(style, key=lambda name: (len(name), name))]
        references = [output for output in references if output is not None]
        if not references:
            raise StyleLoomError("style is not connected", "an encoded picture", "Connect Encode Style Image to style.")
        architecture = check_fit(model, ipadapter)
        weights = parse_numbers(reference_weights, "reference_weights")
        strengths = preset, weight, layout_weight, layout is not None, block_weights
        if isinstance(ipadapter, DiTAdapter):
            check_settings(ipadapter, scaling, fusion, weights)
            chosen = style_blocks.choose(architecture, ipadapter.name, *strengths)
        else:
            chosen = presets.choose(architecture, *strengths, boost)
        used = {whose for _, whose in chosen.values()}
        notes = []
        if layout is not None and not used & {presets.LAYOUT, *presets.AWAY_FROM.values()}:
            notes.append(f"layout is connected, but preset {preset} shows it to no layer")
        if block_weights.strip() and preset != presets.CUSTOM and not presets.is_precise(preset):
            notes.append(f"block_weights count only in preset custom and the precise ones; preset is {preset}")
        steps = parse_numbers(step_weights, "step_weights")
        settings = injection_settings(start_percent, end_percent, mask, negative, weights, steps)
        report = functools.partial(injection_report, ipadapter, architecture, preset, chosen)
        if not chosen:
            return io.NodeOutput(model, report({}, fusion, scaling, settings, notes))
        groups = one_by_one(fusion, references)
        masks = masks_of(fusion, mask, len(groups))
        if fusion == BY_MASK and len(weights) > len(groups):
            raise StyleLoomError(
                f"reference_weights has {len(weights)} numbers, and style {len(groups)} references",
                "at most one for each",
                "Take the last ones out.",
            )
        each = [weights] * len(groups)
        if fusion == BY_MASK and weights:
            each = [[w] for w in repeat_last(weights, len(groups))]
        progress, patched, counts = Steps(len(chosen) * len(groups)), model, {}
        over = StepWeights(steps, start_percent, end_percent) if steps else None
        for i, group in enumerate(groups):
            made = Tokens(ipadapter, used, group, [] if layout is None else [layout], negative, fusion, each[i])
            when = {"mask": masks[i], "start": start_percent, "end": end_percent, "steps": over}
            patched = install(patched, ipadapter, chosen, made, scaling, progress, **when)
            counts = {name: counts.get(name, 0) + n if name == presets.STYLE else n for name, n in made.counts.items()}
            notes += made.notes
        for note in notes:
            logging.warning("StyleLoom: %s", note)
        return io.NodeOutput(patched, report(counts, fusion, scaling, settings, notes))
