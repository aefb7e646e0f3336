"""Cross-attentions of a UNet that see more rows than the batch has, because a patch of another node repeats some.

Attention-Couple nodes give every regional prompt a copy of the positive rows, for the length of one layer, and fold the
copies together after it. Which row each copy is of is found by running: the same patches are given rows that carry
their own numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

KEY = "styleloom_repeated_rows"  # in a block's extra_options: for each row, the row of the batch that it is a copy of
_EXACT = 256  # whole numbers that every dtype holds


def tracing(options: Mapping, model: torch.nn.Module, learn: Callable[[tuple[int, ...]], None] | None = None) -> dict:
    """Transformer options in which patches of cross-attentions leave word of the rows that they repeat.

    Args:
        options: `transformer_options`; they stay as they are.
        model: The diffusion model; only the host's UNet has patches of this kind.
        learn: Also told, before the layers of the attention run: () where it is not known.
    """
    patches = options.get("patches") or {}
    if not patches.get("attn2_patch") or type(model).__name__ != "UNetModel":
        return dict(options)
    return {**options, "patches": {**patches, "attn2_patch": [_Traced(list(patches["attn2_patch"]), learn)]}}


class _Traced:
    def __init__(self, patches: list[Callable], learn: Callable | None):
        self.patches, self.learn = patches, learn

    def _through(self, q, k, v, extra_options):
        for patch in self.patches:
            q, k, v = patch(q, k, v, extra_options)
        return q, k, v

    def __call__(self, q, k, v, extra_options):
        made = self._through(q, k, v, extra_options)
        if made[0].shape[0] == q.shape[0]:
            return made
        numbered = _numbered(k)
        marks = self._through(_numbered(q), numbered, numbered if v is k else _numbered(v), extra_options)[0]
        rows = _read(marks, q.shape[0])
        extra_options[KEY] = rows
        if self.learn is not None:
            self.learn(rows)
        return made


def _numbered(tensor: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(tensor.shape[0], device=tensor.device).to(tensor.dtype)
    return numbers.view(-1, *(1 for _ in tensor.shape[1:])).expand(tensor.shape).contiguous()


def _read(marks: torch.Tensor, rows: int) -> tuple[int, ...]:
    """The numbers that came out, or () where they are not those that went in."""
    flat = marks.reshape(marks.shape[0], -1)
    first = flat[:, :1]
    found = first[:, 0].tolist()
    if rows > _EXACT or not bool((flat == first).all()) or not all(value in range(rows) for value in found):
        return ()
    return tuple(int(value) for value in found)
