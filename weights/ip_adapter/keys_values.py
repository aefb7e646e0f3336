"""Image tokens do not change while sampling, so their keys and values are made once, for the layers in use.

All pictures of a layer and both sides go through its two matrices in one product, so each matrix is read once. What came
out is kept by adapter and by the tokens' own numbers: another weight, schedule, mask or preset, or the same picture again
in another node, reads only what has not been read yet.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import StyleLoomError
from ..parallel import map_single_threaded
from ..row_adapters.rows import NEGATIVE, POSITIVE
from ..unet.architecture import Layer
from .formats import BASE, Adapter
from .projections import image_tokens

CONCAT, AVERAGE, EACH = "concat", "average", "one per picture"
FUSIONS = (CONCAT, AVERAGE, EACH)
V_ONLY, K_AND_V = "V", "K+V"
SCALINGS = (V_ONLY, K_AND_V)


_ROWS = 128  # of a matrix at a time: 2048 columns of them are a megabyte in fp32
_KEPT_BYTES = 96 * 2**20  # of keys and values of one adapter


class KeysValues(NamedTuple):
    """Of one layer: k and v (2, pictures, tokens, width), first axis `POSITIVE`, `NEGATIVE`; pictures 1 unless one
    each."""

    k: torch.Tensor
    v: torch.Tensor


def fuse(adapter: Adapter, references: torch.Tensor, negative: torch.Tensor | None, fusion: str) -> torch.Tensor:
    """Tokens of both sides of guidance from features.

    Args:
        references: features of the reference pictures, first axis the pictures.
        negative: features for the unconditional side. None: kind base takes zeros in the place of the embedding, as
            published; the other kinds need the features of an empty picture.
        fusion: concat puts the tokens of all references side by side; average takes the mean of the features; one per
            picture keeps them apart.

    Returns:
        (2, pictures, tokens, cross) fp32. Where one side has fewer tokens than the other, its tokens are repeated,
        which leaves an attention over them as it is.

    Raises:
        StyleLoomError: no reference, no features for the unconditional side, numbers that do not fit one per picture.
    """
    if not len(references):
        raise StyleLoomError("style is an empty batch", "at least one encoded picture", "Look at the node before.")
    if negative is None:
        if adapter.kind != BASE:
            raise StyleLoomError(
                f"{adapter.name} is a {adapter.kind} adapter, and what it does without a picture is not known",
                "for the negative side of guidance, the encoding of an empty picture",
                "Encode the style with Encode Style Image, which brings it along; or connect an encoded empty (or "
                "unwanted) picture to negative.",
            )
        negative = references.new_zeros(1, adapter.width)
    if fusion == AVERAGE:
        references, negative = (t.float().mean(0, keepdim=True) for t in (references, negative))
    elif fusion == EACH and len(negative) not in (1, len(references)):
        raise StyleLoomError(
            f"negative has {len(negative)} pictures and style {len(references)}",
            "one negative, or one for each",
            "Connect one negative picture, or choose another fusion.",
        )
    both = torch.cat([references.float(), negative.to(references.device, torch.float32)])
    cond, uncond = image_tokens(adapter, both).split([len(references), len(negative)])
    if fusion == EACH:
        return _sides(cond, uncond.expand_as(cond))
    cond, uncond = (t.flatten(0, 1)[None] for t in (cond, uncond))
    length = math.lcm(cond.shape[1], uncond.shape[1])
    return _sides(*(t.repeat(1, length // t.shape[1], 1) for t in (cond, uncond)))


def _sides(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Both sides of guidance along a new first axis."""
    return torch.stack([{POSITIVE: positive, NEGATIVE: negative}[side] for side in sorted((POSITIVE, NEGATIVE))])


def project(
    adapter: Adapter,
    chosen: Mapping[Layer, tuple[float, str]],
    tokens: Mapping[str, torch.Tensor],
    scaling: str = V_ONLY,
    dtype: torch.dtype = torch.float16,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[Layer, KeysValues]:
    """K = W_k·t and V = W_v·t, the weight multiplied in: w·softmax(QKᵀ)V = softmax(QKᵀ)(wV).

    Args:
        chosen: from `blocks.choose`.
        tokens: by picture ("style", "layout"), each (2, pictures, tokens, cross) fp32, on the device to compute on.
        scaling: V, or K+V, which also multiplies K: sharper or flatter attention.
        dtype: of the result; computed in fp32 and rounded once.
        on_layer: called after each.

    Returns:
        Layer → keys and values on the CPU. They are the same whether kept or made.

    Raises:
        StyleLoomError: NaN or infinity, in the file or by rounding.
    """
    numbers = adapter.architecture.file_numbers
    kept = {whose: _kept(adapter, made) for whose, made in tokens.items()}

    def one(layer: Layer) -> KeysValues:
        weight, whose = chosen[layer]
        made = []
        if layer not in kept[whose]:
            pair = adapter.layers[numbers[layer]]
            kept[whose][layer] = KeysValues(*(_product(tokens[whose], matrix).cpu() for matrix in pair))
        for name, result in zip("kv", kept[whose][layer]):
            if name == "v" or scaling == K_AND_V:
                result = result * weight
            result = result.to(dtype)
            if not bool(result.isfinite().all()):
                raise StyleLoomError(
                    f"{adapter.name}: {numbers[layer]}.to_{name}_ip.weight gives values that are not finite in "
                    f"{str(dtype).removeprefix('torch.')}",
                    "finite numbers",
                    "The file is damaged (download it again), or the weight is far too high.",
                )
            made.append(result)
        return KeysValues(*made)

    done = {}
    # On the CPU the time goes into reading the matrices, which threads with one each do best; a GPU has its own order.
    on_cpu = all(t.device.type == "cpu" for t in tokens.values())
    with map_single_threaded(one, chosen) if on_cpu else nullcontext(map(one, chosen)) as results:
        for layer, result in zip(chosen, results):
            done[layer] = result
            on_layer()
    return done


def _product(tokens: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """tokens · matrixT in fp32. On a processor the matrix is cast a piece at a time: a whole one in fp32 would be
    written to memory and read again."""
    if tokens.device.type != "cpu" or matrix.dtype == torch.float32:
        return F.linear(tokens, matrix.to(tokens.device, torch.float32))
    return torch.cat([F.linear(tokens, rows.float()) for rows in matrix.split(_ROWS)], dim=-1)


_by_adapter: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _kept(adapter: Adapter, tokens: torch.Tensor) -> dict[Layer, KeysValues]:
    """Keys and values in fp32 without a weight, of an adapter that is still loaded and of these tokens; to be filled."""
    content = tokens.detach().cpu().contiguous()
    mark = (tuple(content.shape), hashlib.sha256(content.numpy().tobytes()).digest(), tokens.device.type)
    of_adapter: OrderedDict = _by_adapter.setdefault(adapter, OrderedDict())
    found = of_adapter.setdefault(mark, {})
    of_adapter.move_to_end(mark)
    sizes = [sum(t.nbytes for pair in layers.values() for t in pair) for layers in of_adapter.values()]
    while len(of_adapter) > 1 and sum(sizes) > _KEPT_BYTES:
        of_adapter.popitem(last=False)
        sizes.pop(0)
    return found
