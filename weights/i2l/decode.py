"""From embeddings to low-rank factors, streamed from the predictor's file.

For one picture with the embedding x (in_dim), and for predictors with a residual branch its residual vector r,

    A = reshape(W_out_a (W_in_a x + r), (rank, a_width))    B = reshape(W_out_b (W_in_b x + r), (b_width, rank))
    r = W_res_out · flatten(W_res_in · (0.05 · hidden))     hidden (tokens, text_width), once per block

(row-major; no biases, no activation; i2L v1 as in DiffSynth-Studio's `*_image2lora.py`.) Every weight is used exactly
once for all pictures, so the file is read once, in its own order, and nothing of it stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TypeVar

import torch
from torch.nn.functional import linear, pad

from ..errors import StyleLoomError
from ..lora.low_rank import LowRank
from ..parallel import map_single_threaded
from ..tensor_file import TensorFile
from .layouts import PredictorSpec, Target, targets

Result = TypeVar("Result")

ARITHMETICS = ("reference", "fp32")
RESIDUAL_SCALE = 0.05
_GROUP = 4  # rows of a product in bf16, see `_apply`


def _grouped(x: torch.Tensor) -> torch.Tensor:
    """Rows filled up with zeros to whole groups, see `_apply`."""
    return pad(x, (0, 0, 0, -len(x) % _GROUP)) if x.dtype == torch.bfloat16 else x


def _apply(x: torch.Tensor, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
    """x (rows, in) times a weight (out, in) that comes in pieces, in x's dtype, such that no row depends on another.

    Published is one picture after another, and a product of another height may round differently. So every product
    has the same height: `_GROUP` rows in bf16, which cost what one row costs on a processor with bf16 instructions, and
    one row in fp32. A piece is used for all pictures while it is in the processor's cache, and only a piece at a time
    is cast.
    """
    groups = x.split(_GROUP if x.dtype == torch.bfloat16 else 1)
    out = []
    for piece in pieces:
        out += [torch.cat([linear(group, piece) for group in groups]) if len(groups) > 1 else linear(x, piece)]
    return torch.cat(out, dim=1) if len(out) > 1 else out[0]


def _residual(file: TensorFile, block: str, hidden: torch.Tensor) -> torch.Tensor:
    """(N, tokens, text_width) → (rows, compress)."""
    h = [
        torch.stack([linear(tokens, piece) for tokens in hidden])
        for piece in file.rows(f"{block}.proj_residual.proj_in.weight", hidden.dtype)
    ]
    return _apply(
        _grouped(torch.cat(h, dim=2).flatten(1)), file.rows(f"{block}.proj_residual.proj_out.weight", hidden.dtype)
    )


def _check_inputs(file: TensorFile, spec: PredictorSpec, x: torch.Tensor, hidden: torch.Tensor | None) -> None:
    name = file.header.name
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != spec.in_dim:
        raise StyleLoomError(
            f"the references are {list(x.shape)}, which {name} cannot read",
            f"(pictures, {spec.in_dim})",
            "Encode the references with the two image encoders that belong to this predictor "
            "(SigLIP2-G384 and DINOv3-7B for the published ones).",
        )
    r = spec.residual
    if r is None:
        return
    if hidden is None:
        raise StyleLoomError(
            f"{name} also reads the text encoder's view of the pictures (residual_{r.kind}), which the references lack",
            f"references encoded with Qwen-Image's text encoder ({r.tokens} tokens of {r.text_width})",
            "Connect Qwen-Image's CLIP (with its vision part) to Encode References.",
        )
    if tuple(hidden.shape) != (x.shape[0], r.tokens, r.text_width):
        raise StyleLoomError(
            f"residual_{r.kind} of the references is {list(hidden.shape)}, which {name} cannot read",
            f"({x.shape[0]}, {r.tokens}, {r.text_width})",
            "Encode the references with the text encoder that belongs to this predictor (Qwen2.5-VL 7B).",
        )


def _check_finite(file: TensorFile, stored: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    # A sum is the cheapest look at every number: it is finite only if all of them are.
    if all(t.sum().isfinite() or t.isfinite().all() for t in pair):
        return
    keys = [key for key in file.header.tensors if key.startswith(stored.rsplit(".layers.", 1)[0] + ".")]
    bad = [key for key in keys if not bool(file[key].float().isfinite().all())]
    where = f"its tensor {bad[0]} holds NaN or infinity" if bad else f"{stored} overflows for these references"
    raise StyleLoomError(
        f"{file.header.name}: {where}",
        "finite numbers",
        "Download the predictor again." if bad else "Use the arithmetic fp32.",
    )


def _decode_block(
    file: TensorFile,
    spec: PredictorSpec,
    block: str,
    group: list[Target],
    x: torch.Tensor,
    count: int,
    hidden: torch.Tensor | None,
    finish: Callable[[str, list[LowRank]], Result],
) -> dict[str, Result]:
    """All targets of one block; `x` holds `count` pictures, and rows that only fill up."""
    residual = _residual(file, block, hidden) if spec.residual is not None else None
    found = {}
    for target in group:
        factors = []
        for factor, shape in (
            ("proj_a", (spec.rank, spec.widths[target.a_width])),
            ("proj_b", (spec.widths[target.b_width], spec.rank)),
        ):
            h = _apply(x, file.rows(f"{target.stored}.{factor}.proj_in.weight", x.dtype))
            if residual is not None:
                h = h + residual
            out = _apply(h, file.rows(f"{target.stored}.{factor}.proj_out.weight", x.dtype))
            factors.append(out[:count].unflatten(1, shape))
        _check_finite(file, target.stored, factors)
        found[target.name] = finish(target.name, [LowRank(down, up) for down, up in zip(*factors)])
    return found


def _keep(name: str, pairs: list[LowRank]) -> list[LowRank]:
    # Clones, as the pictures of a target lie in one tensor, with rows that only fill up.
    return [LowRank(pair.down.clone(), pair.up.clone()) for pair in pairs]


def decode(
    file: TensorFile,
    spec: PredictorSpec,
    embeddings: torch.Tensor,
    hidden: torch.Tensor | None = None,
    arithmetic: str = "reference",
    on_target: Callable[[], None] | None = None,
    finish: Callable[[str, list[LowRank]], Result] = _keep,
) -> dict[str, Result]:
    """Predict one LoRA per picture.

    Args:
        file: the open predictor.
        spec: what its header says.
        embeddings: (N, in_dim), any float dtype, SigLIP2 before DINOv3.
        hidden: (N, tokens, text_width) hidden states of the text encoder, for predictors with a residual branch;
            ignored by the others, as in the reference.
        arithmetic: "reference" is bf16 with rounding between the two maps, one picture after another; "fp32" upcasts
            the weights and rounds nothing.
        on_target: called after each target; what it raises stops the decoding and leaves nothing behind.
        finish: what to make of a target's name and its pairs, one per picture: down (rank, a_width), up (b_width,
            rank), bf16 or fp32 after the arithmetic. Called in the thread that decoded them, while they are in its
            cache; it must not keep the pairs themselves. By default the pairs are copied.

    Returns:
        By target name, in the published order, what `finish` made.

    Raises:
        StyleLoomError: wrong shape of the references, residual missing, NaN in the file.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {ARITHMETICS}, got {arithmetic!r}")
    _check_inputs(file, spec, embeddings, hidden)
    dtype = torch.bfloat16 if arithmetic == "reference" else torch.float32
    count = embeddings.shape[0]
    x = _grouped(embeddings.to(device="cpu", dtype=dtype))
    if spec.residual is not None:
        hidden = hidden.to(device="cpu", dtype=dtype) * RESIDUAL_SCALE

    everything = list(targets(spec.family))
    # In the order in which the blocks lie in the file: a cold disk then reads ahead.
    start = file.header.tensors
    blocks = [(block, list(group)) for block, group in groupby(everything, key=lambda t: t.block)]
    blocks.sort(key=lambda item: start[f"{item[1][0].stored}.proj_a.proj_in.weight"].start)

    found: dict[str, Result] = {}

    def work(item: tuple[str, list[Target]]) -> dict[str, Result]:
        return _decode_block(file, spec, *item, x, count, hidden, finish)

    with map_single_threaded(work, blocks) as results:
        for done in results:
            found |= done
            if on_target is not None:
                for _ in done:
                    on_target()
    return {target.name: found[target.name] for target in everything}
