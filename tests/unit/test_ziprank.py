"""ZipRank's closed form against float64 oracles that know nothing of it: dense matrices and projected gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.lora.algebra import thin_svd, truncate
from styleloom.weights.merge.gauge import principal_gauge
from styleloom.weights.merge.ziprank import (
    gains,
    masks_at,
    merge_pair,
    moments,
    own_loss,
    solve_masks,
    squared_sizes,
    stack,
)

F64 = torch.float64
GAINS = st.sampled_from([1.0, 1.3, 2.0])  # masks alone, and with the dual basis of the input directions
TIGHT = settings(max_examples=40, deadline=None)


def matrix(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=F64)


def svd_of(dense: torch.Tensor):
    """Canonical form out of a dense change."""
    return thin_svd(dense, torch.eye(dense.shape[0], dtype=F64))


def product(pair) -> torch.Tensor:
    return pair.up @ pair.down


@st.composite
def layers(draw):
    """Two changes of one weight that share `shared` input directions, at a cosine."""
    seed = draw(st.integers(0, 10**6))
    out, inner = draw(st.integers(6, 24)), draw(st.integers(12, 24))
    r_c, r_s = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    shared = draw(st.integers(0, min(r_c, r_s)))
    cosine = draw(st.sampled_from([0.2, 0.6, 0.9, 1.0]))
    a, b = matrix(seed, r_c, inner), matrix(seed + 1, r_s, inner)
    b[:shared] = cosine * a[:shared] + (1 - cosine**2) ** 0.5 * b[:shared]
    scale = draw(st.sampled_from([0.01, 1.0, 30.0]))
    return (a, matrix(seed + 2, out, r_c)), (b, scale * matrix(seed + 3, out, r_s))


def both(pair):
    return tuple(thin_svd(down, up) for down, up in pair)


def row_projector(dense: torch.Tensor) -> torch.Tensor:
    _, s, vh = torch.linalg.svd(dense, full_matrices=False)
    v = vh[s > 1e-9 * s[0]]
    return v.T @ v


def dense_objective(content, style, merged, p_c, p_s) -> float:
    """p_c ‖(L − L_c) P_c‖² + p_s ‖(L − L_s) P_s‖², all dense."""
    return float(p_c * ((merged - content) @ row_projector(content)).square().sum()
                 + p_s * ((merged - style) @ row_projector(style)).square().sum())


@TIGHT
@given(layers(), st.integers(0, 10**6), st.floats(0, 1), st.booleans(), GAINS)
def test_the_result_does_not_depend_on_how_a_trainer_factored(pair, seed, separation, keep, dual_gain):
    (a, u), (b, w) = pair
    turn = matrix(seed, a.shape[0], a.shape[0]) + 2 * torch.eye(a.shape[0], dtype=F64)
    if torch.linalg.cond(turn) > 1e3:
        turn = torch.eye(a.shape[0], dtype=F64) * 3
    one, _, _ = merge_pair(thin_svd(a, u), thin_svd(b, w), 1.5, 1.0, separation, keep, dual_gain)
    other = thin_svd(torch.linalg.solve(turn, a), u @ turn)
    two, _, _ = merge_pair(other, thin_svd(b, w), 1.5, 1.0, separation, keep, dual_gain)
    assert (product(one) - product(two)).norm() <= 1e-6 * product(one).norm()


@TIGHT
@given(layers(), st.booleans(), GAINS)
def test_separation_zero_is_the_plain_sum(pair, keep, dual_gain):
    (a, u), (b, w) = pair
    merged, _, _ = merge_pair(*both(pair), 1.5, 1.0, 0.0, keep, dual_gain)
    due = u @ a + w @ b
    assert (product(merged) - due).norm() <= 1e-10 * due.norm() + 1e-12 * (u @ a).norm()


@TIGHT
@given(layers(), st.sampled_from([(1.0, 1.0), (1.5, 1.0), (0.3, 2.0)]), st.booleans(), GAINS)
def test_a_lora_merged_with_itself_is_itself(pair, prior, keep, dual_gain):
    (a, u), _ = pair
    merged, masks, _ = merge_pair(thin_svd(a, u), thin_svd(a, u), *prior, 1.0, keep, dual_gain)
    assert (product(merged) - u @ a).norm() <= 1e-6 * (u @ a).norm()
    assert merged.rank == thin_svd(a, u).values.numel(), "the shared directions are written once"


@TIGHT
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([(1.0, 1.0), (2.0, 1.0)]), GAINS)
def test_disjoint_inputs_give_the_exact_sum(seed, separation, prior, dual_gain):
    basis = torch.linalg.qr(matrix(seed, 12, 12)).Q
    a, b = matrix(seed + 1, 3, 5) @ basis[:5], matrix(seed + 2, 4, 6) @ basis[6:]
    u, w = matrix(seed + 3, 9, 3), matrix(seed + 4, 9, 4)
    merged, masks, _ = merge_pair(thin_svd(a, u), thin_svd(b, w), *prior, separation, True, dual_gain)
    assert (product(merged) - u @ a - w @ b).norm() <= 1e-9 * product(merged).norm()
    assert float((masks.content - 1).abs().max()) < 1e-9 and float((masks.style - 1).abs().max()) < 1e-9


@TIGHT
@given(layers(), st.floats(0, 1), st.booleans(), GAINS)
def test_swapping_roles_and_priors_swaps_masks(pair, separation, keep, dual_gain):
    c, s = both(pair)
    one, masks, m = merge_pair(c, s, 1.5, 0.5, separation, keep, dual_gain)
    two, swapped, _ = merge_pair(s, c, 0.5, 1.5, separation, keep, dual_gain)
    assert (product(one) - product(two)).norm() <= 1e-7 * max(1.0, product(one).norm())
    if m.cosines.numel() < 2 or float((m.cosines[:-1] - m.cosines[1:]).min()) > 1e-4:  # else the order is free
        assert torch.allclose(masks.content, swapped.style, atol=1e-6)
        assert torch.allclose(masks.style, swapped.content, atol=1e-6)


def big_system(gauge, p_c, p_s):
    """(p_c G_c + p_s G_s, right side) of the R × R problem, with G_k = (UᵀU) ∘ (V C_k Vᵀ), straight from the objective."""
    u, v = torch.cat((gauge.up_c, gauge.up_s), 1), torch.cat((gauge.down_c, gauge.down_s))
    e_c = torch.cat((torch.ones(gauge.up_c.shape[1]), torch.zeros(gauge.up_s.shape[1]))).to(F64)
    grams = [(u.T @ u) * ((v @ d.T) @ (d @ v.T)) for d in (gauge.down_c, gauge.down_s)]
    return p_c * grams[0] + p_s * grams[1], p_c * grams[0] @ e_c + p_s * grams[1] @ (1 - e_c)


@TIGHT
@given(layers(), st.sampled_from([(1.0, 1.0), (1.5, 1.0), (0.2, 3.0)]))
def test_the_closed_form_is_the_big_solve_where_the_box_does_not_bind(pair, prior):
    gauge = principal_gauge(*both(pair))
    masks = solve_masks(moments(gauge), *prior, 1e-13)
    system, right = big_system(gauge, *prior)
    free = torch.linalg.solve(system + 1e-13 * system.trace() * torch.eye(len(right), dtype=F64), right)
    n = gauge.cosines.numel()
    r_c = gauge.up_c.shape[1]
    for i in range(n):  # each pair alone: the others do not touch it
        if torch.linalg.cond(system[[i, r_c + i]][:, [i, r_c + i]]) < 1e6:
            x, y = free[i], free[r_c + i]
            if 1e-6 < x < 1 - 1e-6 and 1e-6 < y < 1 - 1e-6:
                assert abs(masks.content[i] - x) < 1e-5 and abs(masks.style[i] - y) < 1e-5


@TIGHT
@given(layers(), st.sampled_from([(1.0, 1.0), (1.5, 1.0), (0.2, 3.0)]))
def test_the_closed_form_is_the_best_in_the_box(pair, prior):
    """By the certificate of a convex problem, from autograd on dense matrices: no masks in [0, 1] are better by more
    than Σ max over z in the box of slopeᵢ (xᵢ − zᵢ)."""
    (a, u), (b, w) = pair
    gauge = principal_gauge(*both(pair))
    masks = solve_masks(moments(gauge), *prior)
    x = torch.cat(masks[:2]).requires_grad_()
    assert bool(((x >= 0) & (x <= 1)).all())
    up, down = torch.cat((gauge.up_c, gauge.up_s), 1), torch.cat((gauge.down_c, gauge.down_s))
    merged = up @ (x[:, None] * down)
    value = sum(p * ((merged - own) @ row_projector(own)).square().sum() for p, own in zip(prior, (u @ a, w @ b)))
    (slope,) = torch.autograd.grad(value, x)
    gap = float((slope * (x.detach() - (slope < 0).to(F64))).sum())
    assert gap <= 1e-7 * float((u @ a).square().sum() + (w @ b).square().sum())


@TIGHT
@given(layers(), st.floats(1.2, 4))
def test_a_content_heavy_prior_lowers_only_conflicting_style_ranks(pair, heavy):
    gauge = principal_gauge(*both(pair))
    m = moments(gauge)
    even, tilted = solve_masks(m), solve_masks(m, heavy, 1.0)
    n = m.cosines.numel()
    orthogonal = m.cosines < 1e-9
    assert torch.equal(tilted.style[n:], even.style[n:]) and torch.equal(tilted.content[n:], even.content[n:])
    assert torch.allclose(tilted.style[:n][orthogonal], even.style[:n][orthogonal], atol=1e-9)
    free = m.kappa.abs() < 1e-12 * (m.alpha[:n] * m.beta[:n]).sqrt()
    assert bool((tilted.style[:n][free] <= even.style[:n][free] + 1e-9).all())
    # Over all pairs the content's own error falls and the style's rises: what a weight is for.
    (a, u), (b, w) = pair
    found = [merge_pair(*both(pair), p, 1.0, 1.0, keep=False)[0] for p in (1.0, heavy)]
    errors = [dense_objective(u @ a, w @ b, product(x), 1.0, 0.0) for x in found]
    assert errors[1] <= errors[0] + 1e-9 * float((u @ a).square().sum())


@TIGHT
@given(layers(), st.floats(0, 1), st.booleans(), GAINS)
def test_losses_and_gains_equal_the_dense_frobenius_quantities(pair, separation, keep, dual_gain):
    (a, u), (b, w) = pair
    content, style = u @ a, w @ b
    merged, masks, m = merge_pair(*both(pair), 1.0, 1.0, separation, keep, dual_gain)
    dense = product(merged)
    pieces = [dense_objective(content, style, dense, *p) for p in ((1.0, 0.0), (0.0, 1.0))]
    due = (pieces[0] / float(content.square().sum()) + pieces[1] / float(style.square().sum())) / 2
    assert abs(float(own_loss(m, masks)) - due) <= 1e-6 * max(1.0, due)
    for gain, own in zip(gains(m, masks), (content, style)):
        value = float(((dense @ row_projector(own)) * own).sum() / own.square().sum())
        assert abs(float(gain) - value) < 1e-6


@TIGHT
@given(layers(), st.integers(1, 12))
def test_max_rank_is_the_best_of_that_rank(pair, rank):
    merged, _, _ = merge_pair(*both(pair), 1.5, 1.0, 0.7)
    dense = product(merged)
    cut = truncate(merged, rank)
    values = torch.linalg.svdvals(dense)
    assert cut.rank <= rank
    assert abs((product(cut) - dense).norm() - values[rank:].norm()) <= 1e-9 * max(1.0, float(values[0]))


def test_a_prior_of_zero_leaves_that_lora_out_of_the_layer():
    c, s = svd_of(matrix(1, 8, 9)), svd_of(matrix(2, 8, 9))
    merged, masks, _ = merge_pair(c, s, 1.0, 0.0, 1.0)
    assert bool((masks.style == 0).all()) and bool((masks.content == 1).all())
    assert (product(merged) - product(c.low_rank())).norm() < 1e-9
    for separation in (0.0, 0.5):
        half, _, _ = merge_pair(c, s, 1.0, 0.0, separation, True, 2.0)
        assert (product(half) - product(c.low_rank())).norm() < 1e-9, "whatever the separation"


def test_layers_side_by_side_are_solved_as_each_alone():
    pairs = [(svd_of(matrix(i, 7, 5 + i)), svd_of(matrix(i + 9, 7, 3)[:, :1] @ matrix(i, 1, 5 + i))) for i in range(3)]
    each = [moments(principal_gauge(c, s)) for c, s in pairs]
    weights = torch.tensor([[1.0], [2.0], [0.5]], dtype=F64)
    together = masks_at(stack(each), weights, 1.0, 0.6, True, 1e-9)
    for i, m in enumerate(each):
        alone = masks_at(m, float(weights[i]), 1.0, 0.6, True, 1e-9)
        assert torch.allclose(together.content[i, : m.alpha.numel()], alone.content)
        assert torch.allclose(together.style[i, : m.beta.numel()], alone.style)


@TIGHT
@given(layers(), GAINS)
def test_keep_strength_undoes_the_mean_sag_up_to_its_limit(pair, dual_gain):
    """Against the dense quantity: the mean share that is left on the own inputs, 1 again unless that takes more than a
    quarter."""
    (a, u), (b, w) = pair
    plain, kept = (merge_pair(*both(pair), 1.0, 1.0, 1.0, keep, dual_gain)[0] for keep in (False, True))
    shares = []
    for own in (u @ a, w @ b):
        on_own = product(plain) @ row_projector(own)
        shares.append(float((on_own * own).sum() / own.square().sum()))
    factor = min(max(2 / sum(shares), 1.0), 1.25) if sum(shares) > 0 else 1.25
    assert (product(kept) - factor * product(plain)).norm() <= 1e-6 * product(plain).norm()


@TIGHT
@given(layers(), st.floats(0, 1), st.booleans(), GAINS)
def test_sizes_are_the_dense_norms(pair, separation, keep, dual_gain):
    (a, u), (b, w) = pair
    merged, masks, m = merge_pair(*both(pair), 1.5, 1.0, separation, keep, dual_gain)
    found = squared_sizes(m, masks)
    scale = float((u @ a).square().sum() + (w @ b).square().sum())
    for squared, matrix in zip(found, (product(merged), u @ a + w @ b)):
        assert abs(float(squared) - float(matrix.square().sum())) <= 1e-6 * scale
