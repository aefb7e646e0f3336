"""Predictors at small width, written by the key scheme of the published files, for tests without the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save

from styleloom.weights.i2l.layouts import FAMILIES, PredictorSpec, Residual, key_shapes

Z_SMALL = PredictorSpec(FAMILIES["z-image"], compress=5, in_dim=12, rank=4, widths={"dim": 6, "mlp": 10})
Q_SMALL = PredictorSpec(FAMILIES["qwen-image"], compress=3, in_dim=10, rank=4, widths={"dim": 4, "mlp": 6, "mod": 8})
Q_COARSE = replace(Q_SMALL, residual=Residual(text_width=4, tokens=71, mid=3))
Q_FINE = replace(Q_SMALL, residual=Residual(text_width=4, tokens=1376, mid=2))


def random_tensors(spec: PredictorSpec, seed: int = 0, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
        for key, shape in key_shapes(spec).items()
    }


_written: dict[tuple, bytes] = {}


def write_predictor(path, spec: PredictorSpec, seed: int = 0, dtype=torch.bfloat16):
    """Writes the predictor; its thousands of tensors are drawn once per session."""
    key = (repr(spec), seed, dtype)
    if key not in _written:
        _written[key] = save(random_tensors(spec, seed, dtype))
    Path(path).write_bytes(_written[key])
    return path
