"""Every kind of adapter as one low-rank product `up @ down`, exactly, without forming the change of the weight.

| kind | change of the weight | low-rank form |
|---|---|---|
| LoRA, LoCon | (alpha/r) up·down | itself; a convolution's down is (r, in·kh·kw) |
| Tucker | (alpha/r) up·(mid ×₂ down) | mid is folded into down |
| LoHa | (alpha/r) (A₁B₁) ∘ (A₂B₂) | row-wise and column-wise Kronecker products: rank r₁·r₂ (face-splitting product) |
| LoKr | (alpha/r) W₁ ⊗ W₂ | the SVD of a Kronecker product is the Kronecker product of the SVDs |

Scales are those of the host: alpha over the rank, 1 where the file has no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..errors import StyleLoomError
from .algebra import thin_svd
from .low_rank import LowRank

LORA, LOHA, LOKR = "LoRA", "LoHa", "LoKr"


def _damaged(stem: str, found: str, expected: str) -> StyleLoomError:
    return StyleLoomError(f"{stem}: {found}", expected, "The LoRA file is damaged: export it again.")


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _finite(tensor: torch.Tensor) -> bool:
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def _check(parts: Mapping[str, torch.Tensor], stem: str, *names: str) -> None:
    lacking = [name for name in names if name not in parts]
    if lacking:
        raise _damaged(stem, f"it has {', '.join(sorted(parts))} and lacks {', '.join(lacking)}", "all of its parts")


def _need(parts: Mapping[str, torch.Tensor], stem: str, *names: str) -> list[torch.Tensor]:
    _check(parts, stem, *names)
    return [_float(parts[name]) for name in names]


def kind_of(parts: Mapping[str, torch.Tensor]) -> str | None:
    """LoRA, LoHa or LoKr by the parts that a stem has; None where they make no low-rank adapter."""
    if "down" in parts or "up" in parts:
        return LORA
    if any(name.startswith("hada_") for name in parts):
        return LOHA
    if any(name.startswith("lokr_") for name in parts):
        return LOKR
    return None


def low_rank(parts: Mapping[str, torch.Tensor], stem: str) -> LowRank:
    """The change that one adapter makes, as a product.

    A plain LoRA keeps its own dtype and its own memory, with alpha / rank as the scale: a whole file in float32 would be
    twice its size. All other kinds are float32 (float64 where the file is) with the scale 1.

    Args:
        parts: tensors by the part names of `names.key_part`.
        stem: for messages.

    Raises:
        StyleLoomError: DoRA, halves of an adapter, ranks that disagree, NaN or infinity.
    """
    if "dora" in parts:
        raise StyleLoomError(
            f"{stem}: this LoRA is a DoRA (it has a magnitude vector)",
            "a LoRA, LoCon, LoHa or LoKr",
            "The change that a DoRA makes depends on the weights of the model, so it cannot be merged as a LoRA. "
            "Load it beside the merged LoRA with ComfyUI's Load LoRA, or extract a LoRA from the model patched "
            "with it.",
        )
    kind = kind_of(parts)
    found = {LORA: _lora, LOHA: _loha, LOKR: _lokr}[kind](parts, stem)
    if not (_finite(found.up) and _finite(found.down)):
        raise StyleLoomError(
            f"{stem}: the LoRA holds NaN or infinity",
            "finite numbers",
            "The training of this LoRA diverged, or the file is damaged: use an earlier save, or download it again.",
        )
    return found


def _alpha(parts: Mapping[str, torch.Tensor], rank: int) -> float:
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


def _lora(parts, stem: str) -> LowRank:
    _check(parts, stem, "down", "up")
    down, up = parts["down"], parts["up"]
    if down.ndim < 2 or up.ndim < 2:
        raise _damaged(stem, f"down is {list(down.shape)} and up is {list(up.shape)}", "matrices or convolutions")
    scale = _alpha(parts, down.shape[0])
    kernel = tuple(down.shape[2:])
    if "mid" in parts:
        flat, up, mid = _float(down).flatten(1), _float(up) * scale, _float(parts["mid"])
        scale = 1.0
        if mid.shape[1] != flat.shape[0] or up.flatten(1).shape[1] != mid.shape[0]:
            raise _damaged(stem, f"mid is {list(mid.shape)} for down {list(down.shape)}", "(rank, rank, kernel)")
        kernel = tuple(mid.shape[2:])
        down = torch.einsum("oj...,ji->oi...", mid, flat)
    if down.dtype != up.dtype or not down.is_floating_point():
        down, up = _float(down), _float(up)
    down, up = down.flatten(1), up.flatten(1)
    if up.shape[1] != down.shape[0]:
        raise _damaged(
            stem, f"down is {list(down.shape)} and up is {list(up.shape)}", "(rank, in) and (out, rank) with one rank"
        )
    return LowRank(down, up, kernel, scale)


def _face_split(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a b) ∘ (c d) = up·down with up[:, (i,j)] = a[:, i] c[:, j] and down[(i,j), :] = b[i] d[j]."""
    up = (a[:, :, None] * c[:, None, :]).flatten(1)
    down = (b[:, None, :] * d[None, :, :]).flatten(0, 1)
    return up, down


def _loha(parts, stem: str) -> LowRank:
    a, b, c, d = _need(parts, stem, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    scale = _alpha(parts, b.shape[0])
    kernel: tuple[int, ...] = ()
    try:
        if "hada_t1" in parts:
            t1, t2 = _need(parts, stem, "hada_t1", "hada_t2")
            kernel = tuple(t1.shape[2:])
            b = torch.einsum("ij...,jr->ir...", t1, b).flatten(1)
            d = torch.einsum("ij...,jr->ir...", t2, d).flatten(1)
            a, c = a.T, c.T
        if a.shape[1] * c.shape[1] < min(a.shape[0], b.shape[1]):
            up, down = _face_split(a, b, c, d)
        else:  # as many products as the matrix has rows or columns: the matrix itself is the smaller form
            up, down = (a @ b) * (c @ d), torch.eye(b.shape[1], dtype=b.dtype)
    except RuntimeError as error:
        raise _damaged(stem, f"the parts of a LoHa do not fit together ({error})", "matrices of one size") from error
    return replace(thin_svd(down, up * scale).low_rank(), kernel=kernel)


def _lokr(parts, stem: str) -> LowRank:
    rank = None
    if "lokr_w1" in parts:
        (w1,) = _need(parts, stem, "lokr_w1")
        first = (torch.eye(w1.shape[1], dtype=w1.dtype), w1)
    else:
        a, b = _need(parts, stem, "lokr_w1_a", "lokr_w1_b")
        first, rank = (b, a), b.shape[0]
    kernel: tuple[int, ...] = ()
    if "lokr_w2" in parts:
        (w2,) = _need(parts, stem, "lokr_w2")
        kernel = tuple(w2.shape[2:])
        w2 = w2.flatten(1)
        second = (torch.eye(w2.shape[1], dtype=w2.dtype), w2)
        if w2.shape[0] < w2.shape[1]:
            second = (w2, torch.eye(w2.shape[0], dtype=w2.dtype))
    else:
        a, b = _need(parts, stem, "lokr_w2_a", "lokr_w2_b")
        rank = b.shape[0]
        if "lokr_t2" in parts:
            (t2,) = _need(parts, stem, "lokr_t2")
            kernel = tuple(t2.shape[2:])
            a, b = a.T, torch.einsum("ij...,jr->ir...", t2, b)
        else:
            kernel = tuple(b.shape[2:])
        second = (b.flatten(1), a.flatten(1))
    scale = 1.0 if rank is None else _alpha(parts, rank)
    one, two = thin_svd(*first), thin_svd(*second)
    down = torch.kron(one.down, two.down)
    up = torch.kron(one.up * one.values, two.up * (two.values * scale))
    return LowRank(down, up, kernel)
