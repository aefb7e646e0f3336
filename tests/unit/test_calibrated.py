"""Measured Grams, the box solver, the layer prior and the bookkeeping of training, against dense quantities."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.lora.algebra import thin_svd
from styleloom.weights.merge.box_qp import gap, minimise_in_box
from styleloom.weights.merge.calibrated import file_grams, mixed, routed, solve_layer
from styleloom.weights.merge.gauge import principal_gauge
from styleloom.weights.merge.objective import Best, prior_loss
from styleloom.weights.merge.priors import OPTIONS, layer_prior
from styleloom.weights.merge.ziprank import Masks, moments, solve_masks

F64 = torch.float64
QUICK = settings(max_examples=25, deadline=None)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@st.composite
def problems(draw):
    """A gauge, and inputs X_c, X_s."""
    seed = draw(st.integers(0, 10**6))
    r_c, r_s = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    a, b = random(seed, r_c, 12), random(seed + 1, r_s, 12)
    b[: min(r_c, r_s)] += draw(st.sampled_from([0.0, 1.0, 3.0])) * a[: min(r_c, r_s)]
    gauge = principal_gauge(thin_svd(a, random(seed + 2, 9, r_c)), thin_svd(b, random(seed + 3, 9, r_s)))
    return gauge, random(seed + 4, 12, 30), random(seed + 5, 12, 25)


def grams_of(gauge, *inputs):
    rows = torch.cat((gauge.down_c, gauge.down_s))
    return tuple((rows @ x) @ (rows @ x).T for x in inputs)


def dense_objective(gauge, z, inputs, weights):
    r_c = gauge.up_c.shape[1]
    content, style = gauge.up_c @ gauge.down_c, gauge.up_s @ gauge.down_s
    merged = gauge.up_c @ (z[:r_c, None] * gauge.down_c) + gauge.up_s @ (z[r_c:, None] * gauge.down_s)
    return sum(p * ((merged - own) @ x).square().sum() for p, own, x in zip(weights, (content, style), inputs))


@QUICK
@given(problems(), st.sampled_from([(1.0, 1.0), (2.0, 0.5)]))
def test_a_layer_is_solved_as_its_dense_objective_by_autograd(problem, weights):
    gauge, *inputs = problem
    ones = Masks(torch.ones(gauge.up_c.shape[1], dtype=F64), torch.ones(gauge.up_s.shape[1], dtype=F64))
    found = torch.cat(solve_layer(gauge, grams_of(gauge, *inputs), *weights, ones)[:2])
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    z = found.clone().requires_grad_()
    value = dense_objective(gauge, z, inputs, weights)
    (slope,) = torch.autograd.grad(value, z)
    scale = float(dense_objective(gauge, torch.zeros_like(found), inputs, weights))
    # The certificate of a convex problem: no masks in the box are better by more than this.
    assert float((slope * (found - (slope < 0).to(F64))).sum()) <= 1.01e-6 * scale


@QUICK
@given(problems())
def test_with_the_files_own_grams_it_is_the_closed_form(problem):
    gauge, *_ = problem
    grams = file_grams(gauge)
    closed = solve_masks(moments(gauge))
    found = solve_layer(gauge, grams, 1.0, 1.0, closed)
    proj = [gauge.down_c.T, gauge.down_s.T]
    one, two = (dense_objective(gauge, torch.cat(m[:2]), proj, (1.0, 1.0)) for m in (found, closed))
    assert abs(float(one - two)) <= 1e-6 * max(1.0, float(two))


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 40), st.sampled_from([torch.float32, F64]))
def test_the_box_solver_meets_the_conditions_of_an_optimum(seed, size, rank, dtype):
    """Karush-Kuhn-Tucker, in float64, also where the problem has many optima, and columns that it does not see."""
    root = random(seed, size, rank)
    root[size // 2 + 1 :] *= 1e-2
    blind = size > 3
    if blind:
        root[1] = 0
    system, right = root @ root.T, root @ (3 * random(seed + 1, rank))
    # Rounding leaves about eps · ‖Q‖ · ‖x‖ in each slope, and so size times that in the gap.
    floor = 100 * torch.finfo(dtype).eps * size * float(system.trace() + right.norm())
    enough = max(1e-9 * float(right.norm()), floor)
    low, high = -0.5, 1.5
    ones, small = torch.ones(size, dtype=dtype), system.to(dtype)
    z = minimise_in_box(small.mv, right.to(dtype), small.diagonal(), ones, low, high, enough).to(F64)
    assert float(z.min()) >= low and float(z.max()) <= high
    slope = system @ z - right
    assert gap(slope, z, low, high) <= 2 * enough
    assert not blind or z[1] == 1


def test_mixing():
    file, measured = torch.eye(3, dtype=F64), torch.diag(torch.tensor([4.0, 0, 0], dtype=F64))
    assert torch.equal(mixed(None, file), file / 3)
    assert torch.equal(mixed(torch.zeros_like(file), file), file / 3)
    assert torch.allclose(mixed(measured, file, 0.2, 0.03), 0.8 * measured / 4 + 0.2 * file / 3 + 0.01 * file)


def test_a_router_at_separation_zero_is_the_sum():
    gauge = principal_gauge(thin_svd(random(1, 3, 8), random(2, 7, 3)), thin_svd(random(3, 2, 8), random(4, 7, 2)))
    alone = routed(gauge, (None, None), 0.0, 1.0, 0.7)
    assert torch.allclose(alone.up @ alone.down, gauge.up_s @ gauge.down_s), "a weight of 0 leaves the content out"
    pair = routed(gauge, (None, None), 1.0, 1.0, 0.0)
    assert torch.allclose(pair.up @ pair.down, gauge.up_c @ gauge.down_c + gauge.up_s @ gauge.down_s)
    sharp = routed(gauge, (None, None), 1.0, 1.0, 1.0, ridge=1e-10)
    assert torch.allclose(sharp.up @ (sharp.down @ gauge.down_c.T), gauge.up_c, atol=1e-5)


def test_the_prior_loss_penalises_the_minor_mask():
    weights = torch.tensor([[2.0], [1.0], [1.0]]), torch.tensor([[1.0], [1.0], [3.0]])
    shares = torch.tensor([[0.5, 0.8], [0.1, 0.9], [0.4, 0.6]], requires_grad=True)
    loss = prior_loss(shares, *weights)
    assert abs(float(loss.detach()) - ((0.3 + 0.08) + (0.0 + 0.04)) / 2) < 1e-6
    (slope,) = torch.autograd.grad(loss, shares)
    assert slope[0, 1] > 0 > slope[0, 0], "downhill, the minor mask shrinks and the major one grows"
    assert slope[1].eq(0).all() and slope[2, 0] > 0 and slope[2, 1] == 0
    assert float(prior_loss(shares, weights[0][1:2].expand(3, 1), weights[0][1:2].expand(3, 1)).detach()) == 0


def test_the_best_masks_are_those_of_the_lowest_mean():
    best = Best(torch.zeros(1), window=2)
    for number, loss in enumerate([5.0, 4.0, 1.0, 2.0, 9.0, 9.0]):
        best.add(loss, torch.tensor([float(number)]))
    assert best.step == 4 and float(best.vector) == 3 and best.losses[-1] == 9


LAYERS = {"input_blocks.7.1": (1.5, 1), "output_blocks.1.1": (1, 1.5), "output_blocks.2.1": (1, 1), "out.2": (1, 1)}


@pytest.mark.parametrize(("layer", "weights"), LAYERS.items())
def test_the_soft_prior(layer, weights):
    prior, note = layer_prior("soft", "sdxl")
    assert prior(f"diffusion_model.{layer}.transformer_blocks.0.attn1.to_q.weight") == weights and not note
    assert prior((f"diffusion_model.{layer}.x.weight", (0, 0, 4))) == weights


def test_presets_and_custom_priors():
    target = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert layer_prior("b-lora", "sdxl")[0](target) == (0, 1)
    assert layer_prior("duolora", "sdxl")[0](target) == (2, 1)
    assert layer_prior("none", "sdxl")[0](target) == (1, 1)
    prior, note = layer_prior("soft", "")
    assert prior(target) == (1, 1) and "SDXL only" in note
    custom = json.dumps({"up_blocks.0.attentions.1": [3, 1], "*": [1, 2], "double_blocks.1": [4, 1]})
    prior, _ = layer_prior("custom", "", custom)
    assert prior(target) == (3, 1) and prior("diffusion_model.double_blocks.1.img_attn.qkv.weight") == (4, 1)
    assert prior("diffusion_model.double_blocks.10.img_attn.qkv.weight") == (1, 2)
    assert prior("name:double_blocks_1_img_attn_qkv") == (4, 1)
    assert set(OPTIONS) == {"soft", "duolora", "b-lora", "none", "custom"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [1]}', '{"a": [1, -1]}', '{"a": [0, 0]}',
                                  '{"a": [1, "x"]}', '{"a": [1, NaN]}', '{"a": [true, 1]}'])
def test_custom_priors_that_are_none(text):
    with pytest.raises(StyleLoomError, match="custom_prior"):
        layer_prior("custom", "sdxl", text)
