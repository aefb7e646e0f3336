"""Lets only chosen blocks of FLUX.1 see the tokens that a style model (Redux) has put behind the text.

A conditioning cannot tell the model which of its tokens these are, so the tokens themselves tell: a wrapper around
`apply_model` looks for them in the text of each row, bit for bit, once a call. That answers at once which rows have
them, where, and how often. The blocks that see them in another strength than 1 then get a mask more, by a replacement
in a copy of the options that runs around what was there before; nothing is written into the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from comfy.patcher_extension import WrappersMP

from ....weights.dit import redux
from ....weights.dit.style_blocks import FLUX1_ALL
from ....weights.errors import StyleLoomError
from ....weights.unet.architecture import Block
from .compiled import is_compiled
from .dit_attention import BlockReplacement

_KEY = "styleloom_redux"


def check_model(model) -> None:
    """Refuses what is not FLUX.1 with all of its blocks."""
    net = model.model.diffusion_model
    counts = [(kind, len(getattr(net, f"{kind}_blocks", ()))) for kind, _ in FLUX1_ALL.counts]
    if type(net).__name__ != "Flux" or counts != list(FLUX1_ALL.counts):
        raise StyleLoomError(
            f"model is {type(model.model).__name__} ({', '.join(f'{n} {kind}' for kind, n in counts)} blocks)",
            f"FLUX.1, which Redux is made for ({' and '.join(f'{n} {kind}' for kind, n in FLUX1_ALL.counts)} blocks)",
            "Connect FLUX.1-dev, schnell, Fill or Kontext, or a model trained from one of them.",
        )


def make_tokens(style_model, encoded, width: int) -> torch.Tensor:
    """What the style model makes of the encoded pictures, one behind the other, (tokens, width).

    Args:
        width: of the conditioning's tokens.

    Raises:
        StyleLoomError: an encoding without patches, or of another width than the style model reads; tokens that are
            not as wide as the conditioning's, or not finite.
    """
    hidden = getattr(encoded, "last_hidden_state", None)
    if getattr(encoded, "styleloom_subtracted", None):
        raise StyleLoomError(
            "clip_vision_output comes from Content Subtract, and a style model reads the picture's patches, which "
            "Content Subtract leaves as they are",
            "an encoded picture without that change",
            "Connect Encode Style Image or CLIP Vision Encode directly.",
        )
    due = getattr(style_model.model, "redux_dim", None)
    found = None if hidden is None else hidden.shape[-1]
    if found is None or due not in (None, found):
        raise StyleLoomError(
            f"clip_vision_output has {'no patches' if found is None else f'patches of width {found}'}",
            f"the patches of the encoder that style_model reads, of width {due}" if due else "the picture's patches",
            "For FLUX.1 Redux encode the picture with sigclip_vision_patch14_384 (SigLIP).",
        )
    tokens = style_model.get_cond(encoded).flatten(0, 1)
    if tokens.shape[-1] != width:
        raise StyleLoomError(
            f"style_model makes tokens of width {tokens.shape[-1]}, and conditioning has {width}",
            "the style model and the text encoder of FLUX.1 (both 4096)",
            "Load flux1-redux-dev with Load Style Model, and encode the prompt with FLUX.1's text encoders.",
        )
    if not bool(tokens.isfinite().all()):
        raise StyleLoomError(
            "style_model makes tokens that are not finite",
            "numbers",
            "Look at the picture and at the style model's file: one of them is damaged.",
        )
    return tokens


def append(conditioning, tokens: torch.Tensor) -> list:
    """The conditioning with the tokens behind each text, as ComfyUI's Apply Style Model puts them there.

    Raises:
        StyleLoomError: they are there already.
    """
    made = []
    for text, extra in conditioning:
        if bool(redux.find(text, tokens.to(text)).any()):
            raise StyleLoomError(
                "conditioning has this picture from this style model already",
                "a picture once: two nodes could not tell their tokens apart",
                "Use one Redux by Blocks for the picture, with preset custom and a weight for each block.",
            )
        extra = dict(extra)
        if "attention_mask" in extra:
            extra["attention_mask"] = redux.widened(extra["attention_mask"], text.shape[1], len(tokens))
            extra["attention_mask_img_shape"] = extra.get("attention_mask_img_shape", (1, 1))
        made.append([torch.cat([text, tokens.to(text.device).expand(len(text), -1, -1)], dim=1), extra])
    return made


class ReduxBlocks:
    """The tokens of one node and how strongly each block sees them. Clones of the model share it.

    Args:
        tokens: (n, width). seen: block -> strength, from `redux.strengths`.
    """

    def __init__(self, tokens: torch.Tensor, seen: Mapping[Block, float]):
        self.tokens = tokens
        self.seen = {block: strength for block, strength in seen.items() if strength != 1.0}
        self._copy: torch.Tensor | None = None
        self._calls = self._found = 0

    def install(self, model):
        """A clone of the MODEL with this; the MODEL itself where every block sees the tokens as they are."""
        if not self.seen:
            return model
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, self.outer_sample)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, self.apply_model)
        return clone

    def outer_sample(self, executor, *args, **kwargs):
        """Around a whole run: says so where the tokens never came, and drops the copy on the device."""
        self._calls = self._found = 0
        try:
            out = executor(*args, **kwargs)
            if self._calls and not self._found:
                logging.warning(
                    "StyleLoom: Redux by Blocks: no conditioning of this run has the picture's tokens as the node made "
                    "them, so nothing was restricted. Connect its conditioning output to the sampler, and put nodes "
                    "that change the text (average, for example) before it."
                )
            return out
        finally:
            self._copy = None

    def apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """Around one call of the model."""
        options = transformer_options
        marks = None if c_crossattn is None else redux.find(c_crossattn, self._like(c_crossattn))
        self._calls += 1
        if marks is not None and bool(marks.any()):
            self._found += 1
            net = executor.class_obj.diffusion_model
            if is_compiled(net, options):
                raise StyleLoomError(
                    "model is compiled (TorchCompileModel), and Redux by Blocks gives its blocks masks",
                    "a model that is not compiled",
                    "Leave the compile node out.",
                )
            options = self._with_masks(_Masks(marks), options)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _like(self, context: torch.Tensor) -> torch.Tensor:
        copy = self._copy
        if copy is None or (copy.device, copy.dtype) != (context.device, context.dtype):
            copy = self._copy = self.tokens.to(context)
        return copy

    def _with_masks(self, masks: _Masks, options: Mapping) -> dict:
        replace = options.get("patches_replace", {})
        dit = dict(replace.get("dit", {}))
        for block, strength in self.seen.items():
            key = (f"{block[0]}_block", block[1])
            dit[key] = _MaskedBlock(masks, (block, strength), dit.get(key))
        return {**options, "patches_replace": {**replace, "dit": dit}}


class _Masks:
    """The masks of one call, made when a block first needs them. marks: from `redux.find`."""

    def __init__(self, marks: torch.Tensor):
        self.marks = marks
        self._made: dict = {}

    def at(self, strength: float, total: int, like: torch.Tensor) -> torch.Tensor:
        key = strength, total, like.dtype
        if key not in self._made:
            # As large as text and picture squared: the last two are kept, hidden and seen.
            self._made = {k: mask for k, mask in [*self._made.items()][-1:]}
            self._made[key] = redux.bias(self.marks.to(like.device), total, strength, like.dtype)
        return self._made[key]


class _MaskedBlock(BlockReplacement):
    """A block in which the tokens are seen in another strength. call: the masks; layer: (block, strength)."""

    def run(self, original: Callable, args: dict) -> dict:
        (block, strength), image, text = self.layer, args["img"], args.get("txt")
        rows, known = self.call.marks.shape
        if len(image) != rows or (text is not None and text.shape[1] != known):
            raise StyleLoomError(
                f"block {block[0]} {block[1]} has {len(image)} rows"
                + ("" if text is None else f" with {text.shape[1]} tokens of text"),
                f"the {rows} rows and {known} tokens of text that the model was given",
                "Another node changes the text or the rows inside the model: leave it out, or Redux by Blocks.",
            )
        total = image.shape[1] + (0 if text is None else known)
        mask = redux.with_bias(args.get("attn_mask"), self.call.at(strength, total, image))
        return original({**args, "attn_mask": mask})
