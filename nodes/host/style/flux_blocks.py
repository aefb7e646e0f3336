"""What the two IP-Adapters of FLUX.1 add to a block, and where.

* XLabs: attention of the picture's queries over the image tokens, added to the picture's stream at the end of a double
  block, without a gate: as in x-flux, where it was trained, and in diffusers. (x-flux-comfyui adds it before the MLP
  instead, so its pictures differ a little.)
* InstantX: added to what the block's attention gives, before its projection. In double blocks the queries are the
  picture's, in single blocks those of all tokens, text as well.

Queries are those of the block behind its norm and before rope. Under a mask the text gets the mask's mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ....weights.errors import StyleLoomError
from .dit_attention import BlockReplacement, with_patch


class _Seen:
    """A patch that makes the picture's part as soon as the block has its queries, (rows, heads, tokens, width of a
    head): what comes after it, rope or a kernel, may write into them.

    Args:
        all_tokens: also for the text, else for the picture that is made alone.
    """

    def __init__(self, block: BlockReplacement, all_tokens: bool):
        self.block, self.all_tokens = block, all_tokens
        self.first, self.image = 0, None

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        call, text = self.block.call, extra_options["img_slice"][0]
        self.first = 0 if self.all_tokens else text
        image = call.attend(self.block.layer, q[:, :, self.first : text + call.target], extra_options)
        share = call.share(image)
        if share is not None:
            if self.first < text:
                share = torch.cat([share.mean(1, keepdim=True).expand(-1, text, -1), share], dim=1)
            image = image * share
        self.image = image
        return {}

    def taken(self) -> torch.Tensor:
        image, self.image = self.image, None
        if image is None:
            raise _no_patches()
        return image


def _no_patches() -> StyleLoomError:
    return StyleLoomError(
        "a block of this model runs without the patches that Style Block Injector gave it",
        "a ComfyUI whose FLUX.1 has the patches attn1_patch and attn1_output_patch",
        "Update ComfyUI, or leave out the node that replaces the blocks of the model.",
    )


def _added(to: torch.Tensor, first: int, what: torch.Tensor) -> torch.Tensor:
    """`to` plus `what` on the tokens from `first` on."""
    if what.shape[1] == to.shape[1]:
        return to + what
    to = to.clone()
    to[:, first : first + what.shape[1]] += what
    return to


class XLabsBlock(BlockReplacement):
    def run(self, original: Callable, args: dict) -> dict:
        seen = _Seen(self, False)
        out = original({**args, "transformer_options": with_patch(args["transformer_options"], attn1_patch=seen)})
        return {**out, "img": _added(out["img"], 0, seen.taken())}


class InstantXBlock(BlockReplacement):
    def run(self, original: Callable, args: dict) -> dict:
        seen, done = _Seen(self, self.layer[0] == "single"), []

        def add(attn: torch.Tensor, extra_options: dict) -> torch.Tensor:
            done.append(True)
            return _added(attn, seen.first, seen.taken())

        options = with_patch(args["transformer_options"], attn1_patch=seen, attn1_output_patch=add)
        out = original({**args, "transformer_options": options})
        if not done:
            raise _no_patches()
        return out
