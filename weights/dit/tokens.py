"""The token tables of diffusion transformers: which layers see the picture, in which order, with which patch.

One entry a class of the host's. Order and sizes were read in the host's model code and are held against it in the
tests, by marking one place of a latent and looking where it comes out in every layer. A subclass of a class named here
may lay its tokens otherwise, so the name has to be exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..places import JOINT, MAP, NOWHERE, PICTURE, TARGET, Given, Grid, Layout, NoPlaces, Unplaced

Patterns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Architecture:
    """How one class lays out its tokens.

    Attributes:
        layers: (pattern for the beginning of a layer's name, what runs through it); the first that fits counts.
        patch: Attributes of the model that hold the patch, (frames, height, width) or the last of them. None: 1.
        before, behind: Inputs whose pictures stand in the sequence before and behind the target.
        optional: Of these, the ones that a model of this class may also leave aside.
        texts: (input, attribute that a model has if it takes it, or None) that make the text of a joint sequence, which
            stands before the picture.
        registers: An attribute (1, tokens, width) of tokens before the text.
        multiple: An attribute: text and picture are each filled up to a multiple of it.
        refused: Inputs with which the order is not known.
    """

    layers: Patterns
    patch: tuple[str, ...] | None = ("patch_size",)
    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    texts: tuple[tuple[str, str | None], ...] = (("context", None),)
    registers: str | None = None
    multiple: str | None = None
    refused: tuple[str, ...] = ()


_TWO_STREAMS: Patterns = (
    (r"double_blocks\.\d+\.(img|txt)_mod\b", NOWHERE),
    (r"double_blocks\.\d+\.img_(attn|mlp)\b", PICTURE),
    (r"double_blocks\.\d+\.txt_(attn|mlp)\b", NOWHERE),
    (r"single_blocks\.\d+\.modulation\b", NOWHERE),
    (r"single_blocks\.\d+\.", JOINT),
    (r"final_layer\.adaLN_modulation\b", NOWHERE),
    (r"final_layer\.linear\b", PICTURE),
    (r"(time_in|time_r_in|vector_in|guidance_in|txt_in|txt_norm|byt5_in|vision_in)\b", NOWHERE),
    (r"(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)\b", NOWHERE),
    (r"distilled_guidance_layer\b", NOWHERE),
)
_FLUX: Patterns = (*_TWO_STREAMS, (r"img_in\b", PICTURE))
_WAN: Patterns = (
    (r"(vace_)?blocks\.\d+\.cross_attn\.(k|v|k_img|v_img)\b", NOWHERE),
    (r"(vace_)?blocks\.\d+\.(self_attn|cross_attn|ffn|before_proj|after_proj)\b", PICTURE),
    (r"(text_embedding|time_embedding|time_projection|img_emb|ref_conv)\b", NOWHERE),
    (r"head\.head\b", PICTURE),
    (r"(vace_)?patch_embedding\b", MAP),
)
_COSMOS = Architecture(
    (
        (r"(blocks\.\d+|final_layer)\.adaln_modulation", NOWHERE),
        (r"blocks\.\d+\.cross_attn\.[kv]_proj\b", NOWHERE),
        (r"blocks\.\d+\.(self_attn|cross_attn|mlp)\b", PICTURE),
        (r"(t_embedder|t_embedding_norm|llm_adapter)\b", NOWHERE),
        (r"(x_embedder|final_layer\.linear)\b", PICTURE),
    ),
    patch=("patch_temporal", "patch_spatial", "patch_spatial"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "Flux": Architecture(_FLUX, behind=("ref_latents",)),  # FLUX.1, Kontext, FLUX.2
    "Chroma": Architecture(_FLUX),
    "NextDiT": Architecture(  # Lumina 2, Z-Image
        (
            (r".*\badaLN_modulation\b", NOWHERE),
            (r"(context_refiner|cap_embedder|siglip_\w+|t_embedder|clip_text_pooled_proj|time_text_embed)\b", NOWHERE),
            (r"noise_refiner\.", PICTURE),
            (r"(layers\.|final_layer\.linear\b)", JOINT),
            (r"x_embedder\b", TARGET),
        ),
        multiple="pad_tokens_multiple",
        refused=("ref_latents",),
    ),
    "QwenImageTransformer2DModel": Architecture(
        (
            (r"transformer_blocks\.\d+\.(img_mod|txt_mod|txt_mlp|attn\.add_\w+|attn\.to_add_out)\b", NOWHERE),
            (r"transformer_blocks\.\d+\.(attn|img_mlp)\b", PICTURE),
            (r"(txt_in|txt_norm|time_text_embed|norm_out)\b", NOWHERE),
            (r"(img_in|proj_out)\b", PICTURE),
        ),
        behind=("ref_latents",),
    ),
    "OpenAISignatureMMDITWrapper": Architecture(  # Stable Diffusion 3
        (
            (r".*\badaLN_modulation\b", NOWHERE),
            (r"joint_blocks\.\d+\.x_block\b", PICTURE),
            (r"joint_blocks\.\d+\.context_block\b", NOWHERE),
            (r"(context_embedder|context_processor|t_embedder|y_embedder)\b", NOWHERE),
            (r"final_layer\.linear\b", PICTURE),
            (r"x_embedder\.proj\b", MAP),
        ),
    ),
    "MMDiT": Architecture(  # AuraFlow
        (
            (r".*\b(modC|modX|modCX|modF)\b", NOWHERE),
            (r"double_layers\.\d+\.(attn\.w2|mlpX\b)", PICTURE),
            (r"double_layers\.\d+\.(attn\.w1|mlpC\b)", NOWHERE),
            (r"single_layers\.\d+\.", JOINT),
            (r"(cond_seq_linear|t_embedder)\b", NOWHERE),
            (r"(init_x_linear|final_linear)\b", PICTURE),
        ),
        registers="register_tokens",
    ),
    "WanModel": Architecture(
        _WAN,
        before=("reference_latent",),
        behind=("time_dim_concat", "context_latents"),
        optional=("reference_latent",),
    ),
    "VaceWanModel": Architecture(_WAN, refused=("time_dim_concat",)),
    "HunyuanVideo": Architecture(
        ((r"final_layer\.linear\b", TARGET), *_TWO_STREAMS, (r"img_in\.proj\b", MAP)),
        before=("ref_latent",),
        texts=(("context", None), ("txt_byt5", "byt5_in"), ("clip_fea", "vision_in")),
    ),
    "LTXVModel": Architecture(
        (
            (r"transformer_blocks\.\d+\.attn2\.to_[kv]\b", NOWHERE),
            (r"transformer_blocks\.\d+\.(attn1|attn2|ff)\b", PICTURE),
            (r"(adaln_single|prompt_adaln_single|caption_projection)\b", NOWHERE),
            (r"(patchify_proj|proj_out)\b", PICTURE),
        ),
        patch=None,
        refused=("keyframe_idxs",),
    ),
    "MiniTrainDIT": _COSMOS,  # Cosmos Predict 2
    "Anima": _COSMOS,
    "SingleStreamDiT": Architecture(  # Krea 2
        (
            (r"(blocks\.\d+|last)\.mod", NOWHERE),
            (r"(blocks\.|last\.linear\b)", JOINT),
            (r"(tmlp|tproj|txtmlp|txtfusion)\b", NOWHERE),
            (r"first\b", PICTURE),
        ),
        patch=("patch",),
        behind=("ref_latents",),
        optional=("ref_latents",),
    ),
}


def _sizes(model, names: tuple[str, ...] | None) -> Grid:
    found: list[int] = []
    for name in names or ():
        value = getattr(model, name)
        found.extend(value if isinstance(value, Sequence) else [value])
    if names is not None and len(found) == 1:
        found = found * 2  # a number for both sides of a picture's patch
    return Grid(*((1, 1, 1, *found)[-3:]))


class DiTTokens:
    """The table of one model.

    Args:
        model: The diffusion model itself, of one of the classes in `ARCHITECTURES`.

    Attributes:
        pictures, texts, refused: Names of the inputs that `Given` has to tell of.
        patch: What of the latent makes one token.
    """

    def __init__(self, model):
        self._name, self._model = type(model).__name__, model
        self._architecture = entry = ARCHITECTURES[self._name]
        self.pictures = (*entry.before, *entry.behind)
        self.texts = tuple(
            name for name, needed in entry.texts if needed is None or getattr(model, needed, None) is not None
        )
        self.refused = entry.refused
        self.patch = _sizes(model, entry.patch)

    @cached_property
    def _multiple(self) -> int:
        return getattr(self._model, self._architecture.multiple or "", None) or 1

    @cached_property
    def _registers(self) -> int:
        name = self._architecture.registers
        return 0 if name is None else getattr(self._model, name).shape[1]

    def stream(self, layer: str) -> str:
        """What runs through a layer, by its name in the diffusion model.

        Raises:
            NoPlaces: a layer that the table does not name.
        """
        for pattern, stream in self._architecture.layers:
            if re.match(pattern, layer):
                return stream
        raise NoPlaces(f"the layer {layer} of {self._name}")

    def _tokens_of(self, grid: Grid) -> Grid:
        return Grid(*(-(-size // patch) for size, patch in zip(grid, self.patch)))

    def _pictures(self, given: Given) -> list[Layout]:
        """The target between its references, in the ways that a model of this class may lay them out."""
        sizes = {name: grids for name, grids in given.pictures if grids}
        found = []
        for leave in dict.fromkeys(((), tuple(name for name in self._architecture.optional if name in sizes))):
            count = {
                name: sum(self._tokens_of(grid).tokens for grid in grids)
                for name, grids in sizes.items()
                if name not in leave
            }
            target = self._tokens_of(given.latent)
            front = sum(count.get(name, 0) for name in self._architecture.before)
            rear = sum(count.get(name, 0) for name in self._architecture.behind)
            rear += -(front + target.tokens + rear) % self._multiple
            found.append(_whole((front, None), (target.tokens, target), (rear, None)))
        return found

    def layout(self, stream: str, shape: tuple[int, ...], given: Given) -> Layout:
        """Where the tokens of a layer stand.

        Args:
            stream: From `stream`, with places.
            shape: The axes of its output that are neither rows nor channels.

        Raises:
            Unplaced: these tokens are not the ones that the table expects.
        """
        there = [name for name in self.refused if name in given.others]
        if there:
            raise Unplaced(f"the order of a {self._name}'s tokens is not known with {there[0]}")
        target, tokens = self._tokens_of(given.latent), math.prod(shape)
        if stream in (TARGET, MAP):
            more = [name for name, grids in given.pictures if grids]
            if more and stream == MAP:
                raise Unplaced(f"it may see {more[0]} as well as the picture")
            fits = shape in ((tokens,), tuple(target), tuple(target[1:]))
            expected = [((target.tokens, target),)] if fits else []
        else:
            expected = self._pictures(given)
            if stream == JOINT:
                text = sum(count for name, count in given.texts if name in self.texts)
                text += self._registers + (-text % self._multiple)
                expected = [_whole((text, None), *layout) for layout in expected]
            if len(shape) > 1:
                expected = [layout for layout in expected if layout == ((tokens, Grid(*(1, 1, *shape)[-3:])),)]
        for layout in expected:
            if sum(count for count, _ in layout) == tokens:
                return layout
        wanted = " or ".join(str(sum(count for count, _ in layout)) for layout in expected)
        raise Unplaced(f"it has {' x '.join(map(str, shape))} tokens" + (f" in place of {wanted}" if wanted else ""))


def _whole(*parts: tuple[int, Grid | None]) -> Layout:
    """Without what is empty; neighbours without a place joined."""
    made: list[tuple[int, Grid | None]] = []
    for count, grid in parts:
        if not count:
            continue
        if grid is None and made and made[-1][1] is None:
            made[-1] = (made[-1][0] + count, None)
        else:
            made.append((count, grid))
    return tuple(made)
