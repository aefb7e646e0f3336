"""The masked LoRA of a layer, and the wrapper that puts terms into layers, against merged weights in float64."""

from __future__ import annotations

import pytest
import torch
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.row_adapters.forward import LayersWithTerms, ModelCall
from styleloom.weights.row_adapters.layers import layer_of
from styleloom.weights.row_adapters.masked import CONTENT, MERGED, STYLE, MaskedLowRank
from styleloom.weights.row_adapters.rows import UnknownRows

D = torch.float64
R_CONTENT, R_STYLE = 2, 3
RANK = R_CONTENT + R_STYLE
MASK = torch.tensor([0.3, 1.2, 0.0, 0.7, 1.0], dtype=D)
ALONE = {CONTENT: (0, R_CONTENT), STYLE: (R_CONTENT, R_STYLE)}
OF_BRANCH = {
    CONTENT: torch.tensor([1.0, 1, 0, 0, 0], dtype=D),
    STYLE: torch.tensor([0.0, 0, 1, 1, 1], dtype=D),
    MERGED: MASK,
}

LAYERS = {
    "linear": (lambda: torch.nn.Linear(6, 8), (3, 6)),
    "linear of 5-D": (lambda: torch.nn.Linear(6, 8), (3, 2, 1, 2, 6)),
    "conv1d": (lambda: torch.nn.Conv1d(6, 8, 3, stride=2, padding=1), (3, 6, 5)),
    "conv2d": (lambda: torch.nn.Conv2d(6, 8, 3, padding=2, dilation=2), (3, 6, 5, 4)),
    "pointwise": (lambda: torch.nn.Conv2d(6, 8, 1), (3, 6, 3, 3)),
    "conv3d": (lambda: torch.nn.Conv3d(6, 8, (1, 3, 2), padding=(0, 1, 0)), (3, 6, 2, 3, 4)),
    "groups": (lambda: torch.nn.Conv2d(6, 8, 3, groups=2), (3, 6, 4, 4)),
}
PARTS = {"whole": (None, None), "outputs": ((2, 4), None), "inputs": (None, (1, 3))}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def made(layer: str, part: str = "whole"):
    """(module, input, change, function of a branch's mask → the merged weight)."""
    module, shape = LAYERS[layer][0]().to(D).requires_grad_(False), LAYERS[layer][1]
    outputs, inputs = PARTS[part]
    whole = module.weight.shape
    out = whole[0] if outputs is None else outputs[1]
    columns = (whole[1] if inputs is None else inputs[1]) * whole[2:].numel()
    change = LowRank(normal(RANK, columns, seed=1), normal(out, RANK, seed=2), (), 1.0, outputs, inputs)

    def weight(mask):
        delta = torch.zeros(whole, dtype=D)
        rows = slice(None) if outputs is None else slice(outputs[0], sum(outputs))
        cols = slice(None) if inputs is None else slice(inputs[0], sum(inputs))
        delta[rows, cols] = (change.up @ torch.diag(mask) @ change.down).reshape(out, -1, *whole[2:])
        return module.weight + delta

    return module, normal(*shape, seed=3), change, weight


def with_weight(module, weight, x):
    return torch.func.functional_call(module, {"weight": weight}, (x,))


def installed(module, term, order, mask=MASK):
    """The layer with the term in it, and the state of the call."""
    root = torch.nn.ModuleDict({"layer": module})
    call = ModelCall()
    strengths = {branch: (ranks,) for branch, ranks in ALONE.items()} | {MERGED: (mask,)}
    call.set_rows(tuple(order), len(order), strengths, tuple(strengths))
    call.active = True
    layers = LayersWithTerms(root.get_submodule, {"layer": dict.fromkeys(strengths, [term])}, call)
    layers.put_in()
    return root.layer, layers, call


CASES = [(layer, part) for layer in LAYERS for part in PARTS if not (layer == "groups" and part != "whole")]


@pytest.mark.parametrize(("layer", "part"), CASES)
def test_each_row_gets_the_ranks_of_its_branch(layer, part):
    module, x, change, weight = made(layer, part)
    expected = [with_weight(module, weight(OF_BRANCH[b]), x[i : i + 1]) for i, b in enumerate((STYLE, MERGED, CONTENT))]
    plain = module(x)
    changed, layers, call = installed(module, MaskedLowRank(layer_of(module), 0, change), (STYLE, MERGED, CONTENT))
    torch.testing.assert_close(changed(x), torch.cat(expected))
    call.active = False
    assert torch.equal(module(x), plain), "outside of a call the layer does what it always did"
    layers.take_out()
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("layer", LAYERS)
def test_the_gradient_of_the_mask_and_of_the_input(layer):
    """Through the layer into whatever comes before it, and through something that is saved behind it."""
    module, x, change, weight = made(layer)

    def gradients(run):
        mask, start = MASK.clone().requires_grad_(), x.clone().requires_grad_()
        run(mask, start.sin()).tanh().square().sum().backward()
        return mask.grad, start.grad

    def through_term(mask, value):
        changed, layers, _ = installed(module, MaskedLowRank(layer_of(module), 0, change), (MERGED,), mask)
        out = changed(value)
        layers.take_out()
        return out

    found = gradients(through_term)
    due = gradients(lambda mask, value: with_weight(module, weight(mask), value))
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one, other)


def test_an_output_that_the_layer_itself_keeps_is_not_written_into():
    """Autograd has saved it for the layer's own backward pass."""

    class Exponential(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).exp()  # exp saves its result

    module = Exponential(6, 8).to(D).requires_grad_(False)
    change = LowRank(normal(RANK, 6, seed=1), normal(8, RANK, seed=2))
    mask, x = MASK.clone().requires_grad_(), normal(3, 6).requires_grad_()
    changed, _, _ = installed(module, MaskedLowRank(layer_of(module), 0, change), (MERGED,), mask)
    changed(x).square().sum().backward()
    assert x.grad.isfinite().all() and mask.grad.isfinite().all()


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "groups"])
def test_what_is_watched_is_down_times_the_input(layer):
    """Of all ranks, whichever of them act."""
    module, x, change, _ = made(layer)
    term, seen = MaskedLowRank(layer_of(module), 0, change), []
    term.watch = seen.append
    changed, _, _ = installed(module, term, (STYLE,))
    changed(x)
    if isinstance(module, torch.nn.Linear):
        due = x.reshape(-1, 6) @ change.down.T
    else:
        alone = type(module)(6, RANK, module.kernel_size, module.stride, module.padding, module.dilation, bias=False)
        alone.weight = torch.nn.Parameter(change.down.reshape(RANK, 6, *module.kernel_size))
        due = alone(x).movedim(1, -1).reshape(-1, RANK)
    (found,) = seen
    torch.testing.assert_close(found, due.detach())


def test_rows_that_no_one_can_tell_apart():
    module, x, change, _ = made("linear")
    changed, _, call = installed(module, MaskedLowRank(layer_of(module), 0, change), (CONTENT, STYLE))
    with pytest.raises(UnknownRows):
        changed(x)
    call.set_rows((STYLE, STYLE), 2, call.strengths, call.acting)
    changed(x)  # one branch alone needs no arrangement


def test_half_precision_layers_compute_in_half_precision():
    module, x, change, weight = made("conv2d")
    due = with_weight(module, weight(MASK), x)
    half = module.to(torch.bfloat16)
    changed, _, _ = installed(half, MaskedLowRank(layer_of(half), 0, change, torch.bfloat16), (MERGED,))
    found = changed(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert float((found.double() - due).norm() / due.norm()) < 8 * 2**-8  # a handful of roundings to 8 bits


def test_factors_made_in_inference_mode_can_be_trained_through():
    with torch.inference_mode():
        change = LowRank(normal(RANK, 6), normal(8, RANK))
    module, x, _, _ = made("linear")
    mask = MASK.clone().requires_grad_()
    changed, _, _ = installed(module, MaskedLowRank(layer_of(module), 0, change), (MERGED,), mask)
    changed(x).square().sum().backward()
    assert mask.grad is not None
