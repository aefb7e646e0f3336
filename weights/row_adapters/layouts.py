"""How the rows of the batch stand in the layers of each class of model, where they do not stand as in the batch.

Read from the code of ComfyUI 0.30 (the file of each class is named) and checked by running every class against two
separate models: `benchmarks/asymmetric_models.py`. A class that is not here is found out by running it, see `probe.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .rows import BATCH, CHUNKS, EACH, ONE_FOR_ALL, ONE_MORE, TILED, TWICE, Layout


@dataclass(frozen=True)
class Split:
    """A part of a model that is run once for each branch, since what is in it mixes the rows of the batch.

    Attributes:
        module: A regular expression on the module's name; "" is the model itself.
        by_rows: The arguments that hold the rows of the batch, by place or name; the rows of each may be a multiple.
        method: What is run.
    """

    module: str
    by_rows: tuple[int | str, ...] = (0,)
    method: str = "forward"


@dataclass(frozen=True)
class Layouts:
    """What is known of one class.

    Attributes:
        rules: (a regular expression on a layer's name, the layout); the first that is found counts. Others: `BATCH`.
        splits: Parts that are run for each branch alone.
        swaps: The model itself swaps the halves of its conditioning before the first layer and back after the last.
        apart: Names of inputs with which the class mixes the rows of a batch; the branches then run apart.
        known: The class is in the table. Where it is not, a layer of as many rows as the batch may still be another.
    """

    rules: tuple[tuple[str, Layout], ...] = ()
    splits: tuple[Split, ...] = ()
    swaps: bool = False
    apart: tuple[str, ...] = ()
    known: bool = True
    _found: dict[str, Layout] = field(default_factory=dict, compare=False)

    def of(self, name: str) -> Layout:
        """The layout of a layer, by its name in the model."""
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = next((made for pattern, made in self.rules if re.search(pattern, name)), BATCH)
        return found


# The time embedding may run a second time, for reference pictures at sigma 0, and with it what is made of it.
_TIMES = (r"(_mod\.|modulation|time_in\.|time_text|t_embedder|vector_in\.|guidance_in\.)", TWICE)
_REFERENCES = Layouts((_TIMES,))
_WAN = Layouts(((r"(^|\.)time_embedding\.", EACH),))  # one time for each frame
_EXPERTS = r"\.ff_i$"

_TABLE: Mapping[str, Layouts] = {
    # comfy/ldm/modules/diffusionmodules/openaimodel.py, cascade, modules/diffusionmodules/mmdit.py, aura, audio
    **dict.fromkeys(
        ("StageC", "StageB", "OpenAISignatureMMDITWrapper", "MMDiT", "AudioDiffusionTransformer"),
        Layouts(),
    ),
    "UNetModel": Layouts(((r"\.time_(stack|mixer|pos_embed)\.", CHUNKS),)),  # the frames of SVD are latents
    **dict.fromkeys(("Flux", "NextDiT", "QwenImageTransformer2DModel"), _REFERENCES),
    # lumina/model.py: one row for each patch
    "NextDiTPixelSpace": Layouts(((r"(^|\.)dec_net\.", EACH), _TIMES)),
    # pixart/pixartms.py: height and width as rows of their own; the prompts of all rows one after the other
    "PixArtMS": Layouts(((r"(^|\.)csize_embedder\.", EACH), (r"cross_attn\.kv_linear$", Layout("each", 1)))),
    # hydit/models.py, poolers.py
    "HunYuanDiT": Layouts(((r"(^|\.)mlp_t5\.", EACH), (r"(^|\.)pooler\.", Layout("batch", 1)))),
    "Chroma": Layouts(),
    # chroma_radiance/model.py: patches as rows, and from 512 on in tiles that begin and end anywhere
    "ChromaRadiance": Layouts(splits=(Split("", (0, 1), "forward_nerf"),)),
    # pixeldit/modules.py: patches as rows, and the feed-forward in pieces of them
    **dict.fromkeys(
        ("PixDiT_T2I", "PidNet"),
        Layouts(((r"(^|\.)final_layer\.", EACH),), (Split(r"(^|\.)pixel_blocks\.\d+$", (0, 1)),)),
    ),
    # hidream/model.py: the tokens of all rows, sorted by expert
    "HiDreamImageTransformer2DModel": Layouts(splits=(Split(_EXPERTS),)),
    **dict.fromkeys(
        ("OmniGen2Transformer2DModel", "BooguTransformer2DModel", "Ideogram4Transformer2DModel", "ErnieImageModel"),
        Layouts(),
    ),
    # lens, mage_flow, joyimage
    **dict.fromkeys(
        ("LensTransformer2DModel", "MageFlowTransformer2DModel", "JoyImageTransformer3DModel"), Layouts()
    ),
    # krea2/model.py: tokens as rows
    "SingleStreamDiT": Layouts(((r"(^|\.)txtfusion\.layerwise_blocks\.", EACH),)),
    "QwenImage21Transformer2DModel": Layouts(
        ((r"(^|\.)time_text_embed\..*linear_[12]$", ONE_MORE), (r"(^|\.)modulation\.1$", ONE_MORE))
    ),
    # genmo, cogvideo: the patches of each frame
    "AsymmDiTJoint": Layouts(((r"(^|\.)x_embedder\.", EACH),)),
    "CogVideoXTransformer3DModel": Layouts(((r"(^|\.)patch_embed\.", EACH),)),
    # lightricks/model.py: one time for each token
    "LTXVModel": Layouts(((r"(^|\.)adaln_single\.", EACH),)),
    # hunyuan_video/model.py: a second time that is the same for all; the guiding frame's modulation is broadcast
    "HunyuanVideo": Layouts(((r"(^|\.)time_r_in\.", ONE_FOR_ALL),), apart=("guiding_frame_index",)),
    # cosmos/model.py: time, height, width, batch, channels
    "GeneralDIT": Layouts(
        (
            (r"\.block\.attn\.", Layout("batch", 1)),
            (r"\.block\.layer[12]$", Layout("batch", 3)),
            (r"(^|\.)final_layer\.linear$", EACH),
        )
    ),
    **dict.fromkeys(("MiniTrainDIT", "Anima", "Kandinsky5"), Layouts()),
    # wan/model.py, model_animate.py, model_wandancer.py, ar_model.py
    **dict.fromkeys(("WanModel", "CausalWanModel", "SCAILWanModel", "WanDancerModel", "AnimateWanModel"), _WAN),
    "VaceWanModel": Layouts(((r"(^|\.)vace_patch_embedding$", TILED), *_WAN.rules)),
    "CameraWanModel": Layouts(((r"(^|\.)control_adapter\.", EACH), *_WAN.rules)),
    "HumoWanModel": Layouts(((r"(^|\.)audio_proj\.", EACH), *_WAN.rules)),
    "WanModel_S2V": Layouts(((r"(^|\.)(casual_audio_encoder|audio_injector)\.", EACH), *_WAN.rules)),
    "Hunyuan3Dv2": Layouts(),
    # hunyuan3dv2_1/hunyuandit.py
    "HunYuanDiTPlain": Layouts(splits=(Split(r"\.moe$"),), swaps=True),
    # ace/model.py: a table of positions for all rows
    "ACEStepTransformer2DModel": Layouts(splits=(Split("^lyric_encoder$", (0, 1)),)),
    # ace/ace_step15.py
    "AceStepConditionGenerationModel": Layouts(
        ((r"(^|\.)(tokenizer\.attention_pooler|detokenizer)\.", EACH),),
        (Split("^encoder$", tuple(range(6))),),  # the timbres of all rows go to the first one
    ),
}


def layouts_of(model: object) -> Layouts:
    """What is known of a model's class."""
    return _TABLE.get(type(model).__name__, Layouts(known=False))
