"""LoRAs of every kind of adapter for a model in memory, with seeded values: what trainers write, at small width."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .seeded import normal

Shape = tuple[int, ...]
_POINTWISE = (1, 1)


def modules_of(patcher, contains: str = "") -> dict[str, torch.nn.Module]:
    """LoRA name → module, for every linear layer and convolution of the diffusion model whose name has `contains`."""
    return {
        f"diffusion_model.{name}": module
        for name, module in patcher.model.diffusion_model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and contains in name
    }


def make(patcher, kind: str, contains: str = "", rank: int = 4, alpha: float | None = 2.0, seed: int = 0,
         size: float = 0.3, only: Callable[[torch.nn.Module], bool] = lambda module: True) -> dict[str, torch.Tensor]:
    """A LORA_MODEL of one kind of adapter on all layers that `contains` and `only` pick.

    Args:
        kind: a key of `KINDS`.
        size: the change's size against weights with entries 1/√in.
    """
    made = {}
    for name, module in modules_of(patcher, contains).items():
        if only(module):
            for leaf, tensor in KINDS[kind](f"{seed}.{name}", tuple(module.weight.shape), rank, size).items():
                made[f"{name}.{leaf}"] = tensor
            if alpha is not None and kind not in _WITHOUT_ALPHA:
                made[f"{name}.alpha"] = torch.tensor(float(alpha))
    if not made:
        raise ValueError(f"no layer of the model has {contains!r} in its name")
    return made


def _n(name: str, shape: Shape, size: float) -> torch.Tensor:
    return normal(0, name, shape, size)


def _pair(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    columns = math.prod(shape[1:])
    return {
        "lora_down.weight": _n(f"{name}.down", (rank, *shape[1:]), 1 / math.sqrt(columns)),
        "lora_up.weight": _n(f"{name}.up", (shape[0], rank, *(1 for _ in shape[2:])), 2 * size / math.sqrt(rank)),
    }


def _tucker(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    if len(shape) == 2:
        return _pair(name, shape, rank, size)
    return {
        "lora_down.weight": _n(f"{name}.down", (rank + 1, shape[1], 1, 1), 1 / math.sqrt(shape[1])),
        "lora_mid.weight": _n(f"{name}.mid", (rank + 1, rank + 1, *shape[2:]), 1 / rank),
        "lora_up.weight": _n(f"{name}.up", (shape[0], rank + 1, 1, 1), 2 * size / math.sqrt(rank)),
    }


def _dora(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    ones = (shape[0], *(1 for _ in shape[1:]))
    return _pair(name, shape, rank, size) | {"dora_scale": 1 + 0.2 * _n(f"{name}.dora", ones, 1.0)}


def _loha(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    columns = math.prod(shape[1:])
    return {
        "hada_w1_a": _n(f"{name}.1a", (shape[0], rank), 1.0),
        "hada_w1_b": _n(f"{name}.1b", (rank, columns), 1 / math.sqrt(columns)),
        "hada_w2_a": _n(f"{name}.2a", (shape[0], rank), 1 / math.sqrt(rank)),
        "hada_w2_b": _n(f"{name}.2b", (rank, columns), size),
    }


def _loha_tucker(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    if len(shape) == 2:
        return _loha(name, shape, rank, size)
    made = {}
    for i in (1, 2):
        made[f"hada_t{i}"] = _n(f"{name}.t{i}", (rank, rank, *shape[2:]), 1 / rank)
        made[f"hada_w{i}_a"] = _n(f"{name}.{i}a", (rank, shape[0]), 1.0)
        made[f"hada_w{i}_b"] = _n(f"{name}.{i}b", (rank, shape[1]), math.sqrt(size / shape[1]))
    return made


def _split(number: int) -> tuple[int, int]:
    """Two factors, the first the smaller."""
    first = max(i for i in range(1, math.isqrt(number) + 1) if number % i == 0)
    return first, number // first


def _lokr(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    (out1, out2), (in1, in2) = _split(shape[0]), _split(shape[1])
    return {
        "lokr_w1": _n(f"{name}.1", (out1, in1), 1.0),
        "lokr_w2": _n(f"{name}.2", (out2, in2, *shape[2:]), size / math.sqrt(math.prod(shape[1:]))),
    }


def _lokr_factored(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    (out1, out2), (in1, in2) = _split(shape[0]), _split(shape[1])
    columns = in2 * math.prod(shape[2:])
    return {
        "lokr_w1_a": _n(f"{name}.1a", (out1, rank), 1.0),
        "lokr_w1_b": _n(f"{name}.1b", (rank, in1), 1.0),
        "lokr_w2_a": _n(f"{name}.2a", (out2, rank), 1.0),
        "lokr_w2_b": _n(f"{name}.2b", (rank, columns), size / math.sqrt(math.prod(shape[1:]) * rank)),
    }


def _lokr_tucker(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    if len(shape) == 2:
        return _lokr_factored(name, shape, rank, size)
    (out1, out2), (in1, in2) = _split(shape[0]), _split(shape[1])
    return {
        "lokr_w1": _n(f"{name}.1", (out1, in1), 1.0),
        "lokr_t2": _n(f"{name}.t2", (rank, rank, *shape[2:]), 1 / rank),
        "lokr_w2_a": _n(f"{name}.2a", (rank, out2), 1.0),
        "lokr_w2_b": _n(f"{name}.2b", (rank, in2), size / math.sqrt(shape[1])),
    }


def _oft(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    blocks, block = _split(shape[0])
    return {"oft_blocks": _n(f"{name}.oft", (blocks, block, block), size / block)}


def _boft(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    """Two butterfly stages over blocks of 4; `rescale` as LyCORIS writes it."""
    return {
        "oft_blocks": _n(f"{name}.boft", (2, shape[0] // 4, 4, 4), size / 4),
        "rescale": 1 + 0.1 * _n(f"{name}.rescale", (shape[0], *(1 for _ in shape[1:])), 1.0),
    }


def _glora(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    """W a1 a2 + b1 b2."""
    small = size / math.sqrt(rank)
    return {
        "a1.weight": _n(f"{name}.a1", (shape[1], rank), small),
        "a2.weight": _n(f"{name}.a2", (rank, shape[1]), 1 / math.sqrt(shape[1])),
        "b1.weight": _n(f"{name}.b1", (shape[0], rank), small),
        "b2.weight": _n(f"{name}.b2", (rank, *shape[1:]), 1 / math.sqrt(math.prod(shape[1:]))),
    }


def _glora_old(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    """The first form: W a2 a1 + b2 b1."""
    small, columns = size / math.sqrt(rank), math.prod(shape[1:])
    return {
        "a1.weight": _n(f"{name}.a1", (rank, columns), 1 / math.sqrt(columns)),
        "a2.weight": _n(f"{name}.a2", (columns, rank), small),
        "b1.weight": _n(f"{name}.b1", (rank, columns), 1 / math.sqrt(columns)),
        "b2.weight": _n(f"{name}.b2", (shape[0], rank), small),
    }


def _diff(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    return {"diff": _n(f"{name}.diff", shape, size / math.sqrt(math.prod(shape[1:])))}


def _set(name: str, shape: Shape, rank: int, size: float) -> dict[str, torch.Tensor]:
    return {"set_weight": _n(f"{name}.set", shape, 1 / math.sqrt(math.prod(shape[1:])))}


KINDS: dict[str, Callable[[str, Shape, int, float], dict[str, torch.Tensor]]] = {
    "lora": _pair,
    "tucker": _tucker,
    "dora": _dora,
    "loha": _loha,
    "loha_tucker": _loha_tucker,
    "lokr": _lokr,
    "lokr_factored": _lokr_factored,
    "lokr_tucker": _lokr_tucker,
    "oft": _oft,
    "boft": _boft,
    "glora": _glora,
    "glora_old": _glora_old,
    "diff": _diff,
    "set": _set,
}
_WITHOUT_ALPHA = {"oft", "diff", "set"}


def bias_differences(patcher, contains: str = "", seed: int = 0, size: float = 0.1) -> dict[str, torch.Tensor]:
    """`diff_b` for every linear layer and convolution with a bias."""
    return {
        f"{name}.diff_b": _n(f"{seed}.{name}.diff_b", (module.weight.shape[0],), size)
        for name, module in modules_of(patcher, contains).items() if module.bias is not None
    }


def norm_differences(patcher, contains: str = "", seed: int = 0, size: float = 0.2) -> dict[str, torch.Tensor]:
    """`w_norm` and `b_norm` for every norm with a weight."""
    made = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)) and contains in name:
            if module.weight is None:
                continue
            made[f"diffusion_model.{name}.w_norm"] = _n(f"{seed}.{name}.w", tuple(module.weight.shape), size)
            if getattr(module, "bias", None) is not None:
                made[f"diffusion_model.{name}.b_norm"] = _n(f"{seed}.{name}.b", tuple(module.bias.shape), size)
    return made
