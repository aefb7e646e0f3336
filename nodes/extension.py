"""The list of nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .asymmetric_cfg import AsymmetricCFGGuiderNode, AsymmetricCFGSamplerNode
from .content_subtract import ContentSubtract
from .host import folders
from .i2l_encoders import EncodeReferences, GrayReferences, LoadImageEncoders
from .i2l_predictor import ImageToLoRA, LoadPredictor
from .i2l_references import LoadReferences, SaveReferences
from .lora_blocks import LoRABlockFilter
from .lora_files import ApplyLoRA, LoadLoRA, SaveLoRA
from .lora_stack import LoRAStackNode
from .merge_loras import MergeLoRAs
from .redux_blocks import ReduxByBlocks
from .style_blocks import EncodeStyleImage, LoadIPAdapter, StyleBlockInjector
from .style_encodings import LoadStyleEncoding, SaveStyleEncoding
from .style_helpers import NoiseNegative, StyleWeights
from .ziprank_merge import ZipRankMerge


NODES: list[type[io.ComfyNode]] = [
    LoadPredictor,
    LoadImageEncoders,
    EncodeReferences,
    SaveReferences,
    LoadReferences,
    GrayReferences,
    ImageToLoRA,
    LoadLoRA,
    SaveLoRA,
    ApplyLoRA,
    LoRAStackNode,
    AsymmetricCFGGuiderNode,
    AsymmetricCFGSamplerNode,
    LoadIPAdapter,
    EncodeStyleImage,
    StyleBlockInjector,
    ReduxByBlocks,
    ContentSubtract,
    StyleWeights,
    NoiseNegative,
    SaveStyleEncoding,
    LoadStyleEncoding,
    LoRABlockFilter,
    ZipRankMerge,
    MergeLoRAs,
]


class StyleLoomExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
