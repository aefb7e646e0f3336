"""Keys and values for the blocks of transformers where the small numbers show: tokens so small that eps of a norm counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styleloom.weights.dit.style_blocks import FLUX1_ALL
from styleloom.weights.ip_adapter.dit_formats import INSTANTX, POOLED, DiTAdapter, Linear
from styleloom.weights.ip_adapter.dit_keys_values import project_flux
from styleloom.weights.ip_adapter.timed_resampler import TimedAdapter


def close(made, due):
    return float((made.double() - due).norm() / due.norm()) < 1e-6


def test_instantx_norms_each_head_of_k_and_v():
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(8, 6, generator=g) for _ in "kv")
    blocks = {("single", 5): (Linear(k, None), Linear(v, None))}
    adapter = DiTAdapter("x", INSTANTX, POOLED, 4, 6, 3, None, 8, FLUX1_ALL, {}, blocks)
    tokens = torch.randn(2, 1, 3, 6, generator=g) * 1e-3
    shares = torch.rand(2, 1, 3, 1, generator=g)
    made = project_flux(adapter, {("single", 5, 0): (1.5, "style")}, {"style": tokens}, {"style": shares}, 2, torch.float32)

    def due(w):
        x = (tokens.double() @ w.double().T).unflatten(-1, (2, 4))
        return F.rms_norm(x, (4,), eps=1e-5).flatten(-2)

    assert close(made["single", 5, 0].k, due(k)) and close(made["single", 5, 0].v, due(v) * shares * 1.5)


def test_sd35_norms_heads_with_the_adapters_weight():
    g = torch.Generator().manual_seed(0)
    weight, x = torch.rand(4, generator=g), torch.randn(1, 3, 2, 4, generator=g) * 1e-3
    adapter = TimedAdapter({"layers.0.a": torch.zeros(1)}, {7: {"norm_q.weight": weight}})
    assert close(adapter.normed(7, "norm_q", x), F.rms_norm(x.double(), (4,), weight.double(), 1e-6))
