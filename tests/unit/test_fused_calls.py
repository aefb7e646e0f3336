"""A layer with terms that is called with an activation before it and a residual behind it, against float64 formulas."""

from __future__ import annotations

import pytest
import torch
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.row_adapters.forward import ModelCall, forward_with_terms
from styleloom.weights.row_adapters.fused import UnknownCall, fused
from styleloom.weights.row_adapters.layers import layer_of
from styleloom.weights.row_adapters.low_rank import LowRankTerm

STRENGTH = 0.7


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layer():
    """Row 0 has a LoRA, row 1 none: (the layer with it, weight, bias, the LoRA's product)."""
    linear = torch.nn.Linear(6, 4).double().requires_grad_(False)
    up, down = numbers(4, 2, seed=1), numbers(2, 6, seed=2)
    call = ModelCall()
    call.set_rows((0, 1), 2, {0: (STRENGTH,)}, (0,))
    call.active = True
    term = LowRankTerm(layer_of(linear), [(LowRank(down, up), 0)])
    return forward_with_terms("x", linear.forward, {0: [term]}, call), linear, STRENGTH * up @ down, call


def expected(linear, change, hidden):
    due = hidden @ linear.weight.T + linear.bias
    due[0] += hidden[0] @ change.T
    return due


@pytest.mark.parametrize("noted", (False, True))
@pytest.mark.parametrize("act", ("swiglu", "gelu_tanh", "rms_norm", None))
@pytest.mark.parametrize("scale", (None, "tensor", 0.5))
def test_activation_and_residual(act, scale, noted, layer):
    forward, linear, change, call = layer
    call.called = set() if noted else None
    x, weight = numbers(2, 3, 12 if act == "swiglu" else 6, seed=3), numbers(6, seed=4)
    residual, given = numbers(2, 3, 4, seed=5), {"act_weight": weight, "act_eps": 1e-3} if act == "rms_norm" else {}
    factor = numbers(2, 1, 4, seed=6) if scale == "tensor" else scale
    kept = x.clone(), residual.clone()
    made = forward(x, input_act=act, residual=residual, residual_scale=factor, **given)
    hidden = {
        "swiglu": lambda: x[..., :6] * torch.sigmoid(x[..., :6]) * x[..., 6:],
        "gelu_tanh": lambda: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "rms_norm": lambda: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight,
        None: lambda: x,
    }[act]()
    due = residual + (1 if factor is None else factor) * expected(linear, change, hidden)
    assert torch.allclose(made, due, rtol=0, atol=1e-12)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1]), "what was given stays as it is"
    assert call.called in (None, {"x"})


def test_keywords_that_are_none_are_absent(layer):
    forward, linear, change, _ = layer
    x = numbers(2, 6, seed=3)
    made = forward(x, input_act=None, residual=None, anything=None)
    assert torch.allclose(made, expected(linear, change, x), rtol=0, atol=1e-12)


def test_a_gradient_goes_through(layer):
    forward, _, _, _ = layer
    x, residual = numbers(2, 12, seed=3).requires_grad_(), numbers(2, 4, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: forward(a, input_act="swiglu", residual=b), (x, residual))


def test_what_is_not_known(layer):
    forward, _, _, call = layer
    x = numbers(2, 6, seed=3)
    for words, call_it in (
        ("x is called with the keyword act_up, act_scale",
         lambda: forward(x, input_act="adaln", act_up=x, act_scale=x)),
        ("x is called with the activation adaln", lambda: forward(x, input_act="adaln")),
        ("x is called with 1 positional arguments besides the input", lambda: forward(x, "swiglu")),
        ("a layer is called with the keyword out", lambda: fused("", {"out": x})),
    ):  # fmt: skip
        with pytest.raises(UnknownCall, match=words):
            call_it()
    call.acting, call.called = (), set()
    with pytest.raises(TypeError):  # nothing acts: it reaches the layer, which is the one to know
        forward(x, act_up=x)
    assert call.called == {"x"}, "a window that has not begun: the layer is there all the same"
