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


class _Queries:
    """A patch that keeps the block's queries, (rows, heads, tokens, width of a head)."""

    def __init__(self):
        self.q: torch.Tensor | None = None

    def __call__(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        self.q = q
        return {}

    def taken(self) -> torch.Tensor:
        q, self.q = self.q, None
        if q is None:
            raise _no_patches()
        return q


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
        queries = _Queries()
        options = with_patch(args["transformer_options"], attn1_patch=queries)
        out = original({**args, "transformer_options": options})
        text = out["txt"].shape[1]
        q = queries.taken()[:, :, text : text + self.call.target]
        image = self.call.attend(self.layer, q, args["transformer_options"])
        share = self.call.share(image)
        return {**out, "img": _added(out["img"], 0, image if share is None else image * share)}


class InstantXBlock(BlockReplacement):
    def run(self, original: Callable, args: dict) -> dict:
        queries, done = _Queries(), []

        def add(attn: torch.Tensor, extra_options: dict) -> torch.Tensor:
            q, target = queries.taken(), self.call.target
            text = extra_options["img_slice"][0]
            first = 0 if self.layer[0] == "single" else text
            image = self.call.attend(self.layer, q[:, :, first : text + target], extra_options)
            share = self.call.share(image)
            if share is not None:
                if first < text:
                    share = torch.cat([share.mean(1, keepdim=True).expand(-1, text - first, -1), share], dim=1)
                image = image * share
            done.append(True)
            return _added(attn, first, image)

        options = with_patch(args["transformer_options"], attn1_patch=queries, attn1_output_patch=add)
        out = original({**args, "transformer_options": options})
        if not done:
            raise _no_patches()
        return out
