"""The nodes that a converted workflow may get: sockets, widgets with defaults, outputs, in the editor's order."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """sockets: (name, type, optional), type GROWING for one that grows into `grows`; widgets: (name, type, default);
    outputs: (name, type)."""

    title: str
    sockets: tuple
    widgets: tuple
    outputs: tuple
    grows: str = ""


VISION, IMAGE, MASK, MODEL = "CLIP_VISION_OUTPUT", "IMAGE", "MASK", "MODEL"
ADAPTER, COND = "STYLELOOM_IPADAPTER", "CONDITIONING"
LOAD, CLIP, ENCODE = "StyleLoomLoadIPAdapter", "CLIPVisionLoader", "StyleLoomEncodeStyleImage"
INJECT, NOISE, WEIGHTS = "StyleLoomStyleBlockInjector", "StyleLoomNoiseNegative", "StyleLoomStyleWeights"
SAVE, OPEN, SET_MASK = "StyleLoomSaveStyleEncoding", "StyleLoomLoadStyleEncoding", "ConditioningSetMask"

SHAPES = {
    LOAD: Shape(
        "Load IP-Adapter",
        (),
        (("ipadapter_name", "COMBO", ""), ("siglip_head", "COMBO", "none")),
        (("ipadapter", ADAPTER),),
    ),
    CLIP: Shape("Load CLIP Vision", (), (("clip_name", "COMBO", ""),), (("CLIP_VISION", "CLIP_VISION"),)),
    ENCODE: Shape(
        "Encode Style Image",
        (("clip_vision", "CLIP_VISION", False), ("image", IMAGE, False), ("mask", MASK, True)),
        (("fit", "COMBO", "crop"), ("position", "COMBO", "middle"), ("weight", "FLOAT", 1.0)),
        (("encoded", VISION), ("masks", MASK)),
    ),
    INJECT: Shape(
        "Style Block Injector",
        (
            ("model", MODEL, False),
            ("ipadapter", ADAPTER, False),
            ("style", "GROWING", False),
            ("layout", VISION, True),
            ("negative", VISION, True),
            ("mask", MASK, True),
        ),
        (
            ("preset", "COMBO", "style"),
            ("weight", "FLOAT", 1.0),
            ("layout_weight", "FLOAT", 1.0),
            ("start_percent", "FLOAT", 0.0),
            ("end_percent", "FLOAT", 1.0),
            ("scaling", "COMBO", "V"),
            ("fusion", "COMBO", "concat"),
            ("block_weights", "STRING", ""),
            ("boost", "FLOAT", 1.0),
            ("reference_weights", "STRING", ""),
            ("step_weights", "STRING", ""),
        ),
        (("model", MODEL), ("report", "STRING")),
        grows=VISION,
    ),
    NOISE: Shape(
        "Noise Negative",
        (("image", IMAGE, True),),
        (
            *(("kind", "COMBO", "fade"), ("strength", "FLOAT", 1.0), ("blur", "INT", 0), ("seed", "INT", 0)),
            ("position", "COMBO", "middle"),
        ),
        (("image", IMAGE),),
    ),
    WEIGHTS: Shape(
        "Style Weights",
        (("image", IMAGE, True),),
        (
            ("weights", "STRING", "1.0, 0.0"),
            ("timing", "COMBO", "linear"),
            ("frames", "INT", 16),
            ("start_frame", "INT", 0),
            ("end_frame", "INT", 9999),
            ("add_starting_frames", "INT", 0),
            ("add_ending_frames", "INT", 0),
            ("seed", "INT", 0),
            ("method", "COMBO", "full batch"),
        ),
        (
            *(("weights", "STRING"), ("reversed", "STRING"), ("count", "INT"), ("curve", IMAGE)),
            *(("image_1", IMAGE), ("image_2", IMAGE), ("weights_2", "STRING")),
        ),
    ),
    SAVE: Shape("Save Style Encoding", (("encoded", VISION, False),), (("filename_prefix", "STRING", "style"),), ()),
    OPEN: Shape("Load Style Encoding", (), (("encoding_name", "COMBO", ""),), (("encoded", VISION),)),
    SET_MASK: Shape(
        "Conditioning (Set Mask)",
        (("conditioning", COND, False), ("mask", MASK, False)),
        (("strength", "FLOAT", 1.0), ("set_cond_area", "COMBO", "default")),
        ((COND, COND),),
    ),
}
