"""Image tokens do not change while sampling, so their keys and values are made once, for the layers in use.

All pictures of a layer and both sides go through its two matrices in one product, so each matrix is read once. What
came out is kept by adapter and by the tokens' own numbers: another weight, schedule, mask or preset, or the same
picture again in another node, reads only what has not been read yet.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import StyleLoomError
from ..parallel import map_single_threaded
from ..row_adapters.rows import NEGATIVE, POSITIVE
from ..unet.architecture import Layer
from .combine import AVERAGE, WAYS, combine
from .dit_formats import DiTAdapter
from .formats import BASE, Adapter
from .projections import image_tokens

CONCAT, EACH, BY_MASK = "concat", "one per picture", "one per mask"
FUSIONS = (CONCAT, AVERAGE, EACH, *(way for way in WAYS if way != AVERAGE), BY_MASK)
V_ONLY, K_AND_V = "V", "K+V"
K_AND_V_BY_WIDTH, K_AND_MEAN_BY_WIDTH = "K+V, by width", "K+mean(V), by width"
SCALINGS = (V_ONLY, K_AND_V, K_AND_V_BY_WIDTH, K_AND_MEAN_BY_WIDTH)
_FULL_WIDTH = 1280  # of the widest layers, for the scalings by width


_ROWS = 128  # of a matrix at a time: 2048 columns of them are a megabyte in fp32
_KEPT_BYTES = 96 * 2**20  # of keys and values of one adapter


class KeysValues(NamedTuple):
    """Of one layer: k and v (2, pictures, tokens, width), first axis `POSITIVE`, `NEGATIVE`; pictures 1 unless one
    each."""

    k: torch.Tensor
    v: torch.Tensor


def fuse(
    adapter: Adapter | DiTAdapter,
    references: torch.Tensor,
    negative: torch.Tensor | None,
    fusion: str,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Tokens of both sides of guidance from features.

    Args:
        references: features of the reference pictures, first axis the pictures.
        negative: features for the unconditional side. None: kind base and those for transformers take zeros in the
            place of the embedding, as published; the other kinds need the features of an empty picture.
        fusion: concat (and one per mask, for one reference at a time) puts the tokens of all references side by side;
            average and the other `combine.WAYS` make one of the features; one per picture keeps them apart, and
            repeats the last where there are fewer references than weights or negatives, or the other way round.
        weights: one for each reference, used here by `combine`; the other fusions: see `weighted`.

    Returns:
        (2, pictures, tokens, cross) fp32. Where one side has fewer tokens than the other, its tokens are repeated,
        which leaves an attention over them as it is.

    Raises:
        StyleLoomError: no reference, no features for the unconditional side.
    """
    references, negative = sides_of(adapter, references, negative, fusion, weights)
    both = torch.cat([references.float(), negative.to(references.device, torch.float32)])
    cond, uncond = image_tokens(adapter, both).split([len(references), len(negative)])
    if fusion == EACH:
        return _sides(cond, uncond)
    cond, uncond = (t.flatten(0, 1)[None] for t in (cond, uncond))
    return _evened(cond, uncond)


def sides_of(
    adapter: Adapter | DiTAdapter,
    references: torch.Tensor,
    negative: torch.Tensor | None,
    fusion: str,
    weights: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the positive and of the negative side, first axis the pictures; see `fuse`."""
    if not len(references):
        raise StyleLoomError("style is an empty batch", "at least one encoded picture", "Look at the node before.")
    if negative is None:
        if not isinstance(adapter, DiTAdapter) and adapter.kind != BASE:
            raise StyleLoomError(
                f"{adapter.name} is a {adapter.kind} adapter, and what it does without a picture is not known",
                "for the negative side of guidance, the encoding of an empty picture",
                "Encode the style with Encode Style Image, which brings it along; or connect an encoded empty (or "
                "unwanted) picture to negative.",
            )
        negative = references.new_zeros(1, *references.shape[1:])
    if fusion in WAYS:
        references, negative = combine(references, fusion, weights), combine(negative, AVERAGE)
    elif fusion == EACH:
        count = max(len(references), len(negative), len(weights or ()))
        references, negative = (_repeat_last(t, count) for t in (references, negative))
    return references, negative


def weighted(made: torch.Tensor, fusion: str, weights: Sequence[float] | None, tokens: int) -> torch.Tensor:
    """What V is made of: the tokens of `fuse`, each times the weight of its reference; K is made of them as they are.

    So a reference of weight w adds w times what it would add, and keeps its share of the attention. The negative side
    has no references: with one per picture it takes the weight of its picture, else the mean of the weights, so that
    equal weights are the same as one weight for all.

    Args:
        made: from `fuse`, (2, pictures, tokens, cross).
        weights: one for each reference; None, or a fusion that combines features: nothing changes.
        tokens: of one reference.
    """
    if not weights or fusion in WAYS:
        return made
    w = torch.tensor(list(weights), dtype=torch.float32, device=made.device)
    if fusion == EACH:
        return made * _repeat_last(w, made.shape[1]).view(1, -1, 1, 1)
    positive = w.repeat_interleave(tokens)
    positive = positive.repeat(made.shape[2] // len(positive))
    return made * _sides(positive, w.mean().expand_as(positive))[:, None, :, None]


def turned(away: torch.Tensor, instead: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens with the sides turned round: the negative side sees what the positive one saw.

    Args:
        away: (2, pictures, tokens, cross), from `fuse` or `weighted`.
        instead: the same of another picture, for the positive side; None: nothing, tokens of zeros, of which K and V
            are zeros and the attention adds zeros.
    """
    negative = away[POSITIVE]
    if instead is None:
        return _sides(torch.zeros_like(negative), negative)
    positive = instead[POSITIVE]
    count = max(len(positive), len(negative))
    return _evened(*(_repeat_last(t, count) for t in (positive, negative)))


def _repeat_last(t: torch.Tensor, count: int) -> torch.Tensor:
    """`count` entries of the first axis, the last of them again where there are fewer."""
    return t[torch.arange(count, device=t.device).clamp_max(len(t) - 1)] if len(t) != count else t


def _evened(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Both sides, (pictures, tokens, cross) each, with as many tokens on each: repeated, which leaves attention as it
    is."""
    length = math.lcm(positive.shape[1], negative.shape[1])
    return _sides(*(t.repeat(1, length // t.shape[1], 1) for t in (positive, negative)))


def _sides(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Both sides of guidance along a new first axis."""
    return torch.stack([{POSITIVE: positive, NEGATIVE: negative}[side] for side in sorted((POSITIVE, NEGATIVE))])


def _scaled(x: torch.Tensor, name: str, weight: float, scaling: str) -> torch.Tensor:
    """K or V times the weight, as `scaling` says."""
    if scaling in (K_AND_V_BY_WIDTH, K_AND_MEAN_BY_WIDTH):
        weight = weight * x.shape[-1] / _FULL_WIDTH
    if scaling == K_AND_MEAN_BY_WIDTH and name == "v":
        mean = x.mean(-2, keepdim=True)
        return (x - mean) + mean * weight
    return x * weight if name == "v" or scaling != V_ONLY else x


def project(
    adapter: Adapter,
    chosen: Mapping[Layer, tuple[float, str]],
    tokens: Mapping[str, torch.Tensor],
    scaling: str = V_ONLY,
    dtype: torch.dtype = torch.float16,
    on_layer: Callable[[], None] = lambda: None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> dict[Layer, KeysValues]:
    """K = W_k·t and V = W_v·t, the weight multiplied in: w·softmax(QKᵀ)V = softmax(QKᵀ)(wV).

    Args:
        chosen: from `blocks.choose`.
        tokens: by picture ("style", "layout"), each (2, pictures, tokens, cross) fp32, on the device to compute on.
        scaling: V, or K+V, which also multiplies K: sharper or flatter attention. By width: the weight is first
            multiplied by the layer's width / 1280; K+mean(V) multiplies K and the mean of V over its tokens, and
            leaves what sets the tokens apart as it is.
        dtype: of the result; computed in fp32 and rounded once.
        on_layer: called after each.
        values: what V is made of, by picture, where it is not the same tokens: from `weighted`.

    Returns:
        Layer → keys and values on the CPU. They are the same whether kept or made.

    Raises:
        StyleLoomError: NaN or infinity, in the file or by rounding.
    """
    numbers = adapter.architecture.file_numbers
    kept = {("k", whose): _kept(adapter, made) for whose, made in tokens.items()}
    kept |= {("v", whose): _kept(adapter, made) for whose, made in (values or tokens).items()}

    def one(layer: Layer) -> KeysValues:
        weight, whose = chosen[layer]
        made = []
        for name, matrix in zip("kv", adapter.layers[numbers[layer]]):
            source, known = (tokens if name == "k" else values or tokens)[whose], kept[name, whose]
            if (name, layer) not in known:
                known[name, layer] = _product(source, matrix).cpu()
            result = _scaled(known[name, layer], name, weight, scaling).to(dtype)
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
    _let_go(adapter)
    return done


def _product(tokens: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """tokens · matrixᵀ in fp32. On a processor the matrix is cast a piece at a time: a whole one in fp32 would be
    written to memory and read again."""
    if tokens.device.type != "cpu" or matrix.dtype == torch.float32:
        return F.linear(tokens, matrix.to(tokens.device, torch.float32))
    return torch.cat([F.linear(tokens, rows.float()) for rows in matrix.split(_ROWS)], dim=-1)


_by_adapter: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _kept(adapter: Adapter, tokens: torch.Tensor) -> dict[tuple[str, Layer], torch.Tensor]:
    """("k" or "v", layer) → what the layer makes of these tokens in fp32, without a weight, as long as the adapter is
    loaded; to be filled."""
    content = tokens.detach().cpu().contiguous()
    mark = (tuple(content.shape), hashlib.sha256(content.numpy().tobytes()).digest(), tokens.device.type)
    of_adapter: OrderedDict = _by_adapter.setdefault(adapter, OrderedDict())
    found = of_adapter.setdefault(mark, {})
    of_adapter.move_to_end(mark)
    return found


def _let_go(adapter: Adapter) -> None:
    """What was used longest ago is no longer kept, until the rest is within bounds: a picture for each frame of a long
    video may be more than that by itself."""
    of_adapter = _by_adapter.get(adapter, OrderedDict())
    sizes = [sum(t.nbytes for t in layers.values()) for layers in of_adapter.values()]
    while sizes and sum(sizes) > _KEPT_BYTES:
        of_adapter.popitem(last=False)
        sizes.pop(0)
