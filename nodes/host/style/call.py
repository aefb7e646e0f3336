"""What all layers of one call of the UNet have in common: whose each row is, which picture, and which part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from comfy.ldm.modules.attention import optimized_attention

from ....weights.errors import StyleLoomError
from ....weights.ip_adapter.few_keys import MAX_KEYS, add_attention
from ....weights.ip_adapter.keys_values import KeysValues
from ....weights.unet.architecture import Layer
from ..areas import pictures_of
from ..batch_rows import Rows
from ..repeated_rows import KEY as REPEATED
from .mask_grid import seen_by

if TYPE_CHECKING:
    from .attention import StyleAttention

OVERRIDE = "optimized_attention_override"


class Call:
    """One call of the UNet.

    Args:
        options: `transformer_options` of the call. x: its input, (rows, channels, height, width).
        rows: whose they are.

    Attributes:
        factor: what the picture adds is multiplied by this as well.

    Raises:
        StyleLoomError: rows of which it is not known what they show, where that matters.
    """

    def __init__(self, style: StyleAttention, options: Mapping, x: torch.Tensor, rows: Rows):
        self.style, self.count = style, len(x)
        chunks = options.get("cond_or_uncond") or [0]
        uuids = options.get("uuids") or [None] * len(chunks)
        self.sides = rows.sides
        self.frames, total = pictures_of(options, self.count // len(self.sides))
        self.areas = ()
        self.factor = 1.0
        if not rows.plain:
            self._needs_plain("Another node lays tiles of the picture into one batch")
        if style.mask is not None:
            self.areas = seen_by(options, [uuids[chunk] for chunk in rows.chunks], tuple(x.shape[2:]))
        for name, count in (("style", style.pictures), ("mask", style.mask.pictures if style.mask else 1)):
            if count not in (1, total):
                style.tell(name, count, total)

    def keys_values(self, layer: Layer, device, dtype) -> KeysValues:
        """For the rows of this call, as `StyleAttention.rows` gives them, with the factor in the values."""
        return self._with_factor(self.style.rows(layer, self.sides, self.frames, device, dtype))

    def _with_factor(self, pair: KeysValues) -> KeysValues:
        return pair if self.factor == 1.0 else KeysValues(pair.k, pair.v * self.factor)

    def shares(self, x: torch.Tensor) -> dict[int, torch.Tensor] | None:
        """Number of tokens of a layer -> the mask there, (1 or rows, tokens, 1); None without a mask."""
        mask = self.style.mask
        if mask is None:
            return None
        return mask.levels(tuple(x.shape[2:]), self.areas, self.frames, self.count, x.device)

    def add(
        self, layer: Layer, out: torch.Tensor, q: torch.Tensor, extra_options: Mapping, ours: bool
    ) -> torch.Tensor:
        """out + attention over the image tokens, weight and mask applied.

        Few tokens on a processor are not given to the host's attention (see `few_keys.py`). Whoever has put an
        override in its place is asked all the same: it may want to see every attention.

        Args:
            out, q: (rows, n, width). ours: `out` may be written into.
        """
        sides, frames = self.sides, self.frames
        if q.shape[0] != self.count:
            sides, frames = self._repeated(q.shape[0], extra_options), (0,)
        k, v = self._with_factor(self.style.rows(layer, sides, frames, q.device, q.dtype))
        mask = self.style.mask
        share = None if mask is None else mask.rows(q, extra_options, self.areas, self.frames)
        # Pictures that share their tokens are one long row of queries: nothing is repeated for them.
        long = q.reshape(len(k), -1, q.shape[2])
        heads = extra_options["n_heads"]
        if q.device.type == "cpu" and k.shape[1] <= MAX_KEYS and OVERRIDE not in extra_options and _no_gradients():
            target = out if ours and out.is_contiguous() else out.clone(memory_format=torch.contiguous_format)
            if share is not None and len(k) != len(q):
                share = share.expand(len(q), -1, -1).reshape(len(k), -1, 1)
            return add_attention(target.view(long.shape), long, k, v, heads, share).view(out.shape)
        image = optimized_attention(
            long, k, v, heads, attn_precision=extra_options.get("attn_precision"), transformer_options=extra_options
        ).reshape(q.shape)
        if share is not None:
            image = image * share
        return out.add_(image) if ours and _no_gradients() else out + image

    def _repeated(self, rows: int, extra_options: Mapping) -> tuple[int, ...]:
        """The side of each row of a layer whose rows another node's patch repeats."""
        places = extra_options.get(REPEATED) or ()
        if len(places) != rows:
            raise unknown(f"a layer has {rows} rows, in a batch of {self.count}", extra_options)
        self._needs_plain("Another node gives each region of the picture rows of its own (Attention Couple)")
        return tuple(self.sides[place * len(self.sides) // self.count] for place in places)

    def _needs_plain(self, found: str) -> None:
        """The rows are not the latents alone: which picture or part of it each is cannot be told."""
        if self.style.mask is not None or self.style.pictures > 1:
            raise StyleLoomError(
                f"{found}, and Style Block Injector has "
                + ("a mask" if self.style.mask is not None else "one style per picture"),
                "the plain latents, so that it is known which part of the picture each row shows",
                "Leave mask of Style Block Injector unconnected and choose the fusion concat or average, or leave the "
                "other node out.",
            )


def _no_gradients() -> bool:
    return not torch.is_grad_enabled()


def unknown(found: str, options: Mapping) -> StyleLoomError:
    """The error for rows of which nobody can tell the side; found: which rows."""
    count = len(options.get("cond_or_uncond") or [0])
    return StyleLoomError(
        f"{found}, for {count} conditionings",
        "rows that are known to be on the positive or on the negative side",
        "Another node changes the batch (tiles, regional prompts) in a way that does not show on which side a row is: "
        "give the two sides different prompts, or leave that node out.",
    )


def known(rows: Rows | None, count: int, options: Mapping) -> Rows:
    """The rows, or an error where they are not known."""
    if rows is None:
        raise unknown(f"the model is given {count} rows", options)
    return rows
