"""ZipRank's closed form against float64 oracles that know nothing of it: dense matrices and projected gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.lora.algebra import thin_svd, truncate
from styleloom.weights.merge.gauge import principal_gauge
from styleloom.weights.merge.ziprank import Masks, gains, masks_at, merge_pair, moments, own_loss, solve_masks, stack

F64 = torch.float64
LIMITS = st.sampled_from([1.0, 1.3, 2.0])  # masks alone, and with the input directions turned apart
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
@given(layers(), st.integers(0, 10**6), st.floats(0, 1), st.booleans(), LIMITS)
def test_the_result_does_not_depend_on_how_a_trainer_factored(pair, seed, separation, keep, limit):
    (a, u), (b, w) = pair
    turn = matrix(seed, a.shape[0], a.shape[0]) + 2 * torch.eye(a.shape[0], dtype=F64)
    if torch.linalg.cond(turn) > 1e3:
        turn = torch.eye(a.shape[0], dtype=F64) * 3
    one, _, _ = merge_pair(thin_svd(a, u), thin_svd(b, w), 1.5, 1.0, separation, keep, limit)
    other = thin_svd(torch.linalg.solve(turn, a), u @ turn)
    two, _, _ = merge_pair(other, thin_svd(b, w), 1.5, 1.0, separation, keep, limit)
    assert (product(one) - product(two)).norm() <= 1e-6 * product(one).norm()


@TIGHT
@given(layers(), st.booleans(), LIMITS)
def test_separation_zero_is_the_plain_sum(pair, keep, limit):
    (a, u), (b, w) = pair
    merged, _, _ = merge_pair(*both(pair), 1.5, 1.0, 0.0, keep, limit)
    due = u @ a + w @ b
    assert (product(merged) - due).norm() <= 1e-10 * due.norm() + 1e-12 * (u @ a).norm()


@TIGHT
@given(layers(), st.sampled_from([(1.0, 1.0), (1.5, 1.0), (0.3, 2.0)]), st.booleans(), LIMITS)
def test_a_lora_merged_with_itself_is_itself(pair, prior, keep, limit):
    (a, u), _ = pair
    merged, masks, _ = merge_pair(thin_svd(a, u), thin_svd(a, u), *prior, 1.0, keep, limit)
    assert (product(merged) - u @ a).norm() <= 1e-6 * (u @ a).norm()
    assert merged.rank == thin_svd(a, u).values.numel(), "the shared directions are written once"


@TIGHT
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([(1.0, 1.0), (2.0, 1.0)]), LIMITS)
def test_disjoint_inputs_give_the_exact_sum(seed, separation, prior, limit):
    basis = torch.linalg.qr(matrix(seed, 12, 12)).Q
    a, b = matrix(seed + 1, 3, 5) @ basis[:5], matrix(seed + 2, 4, 6) @ basis[6:]
    u, w = matrix(seed + 3, 9, 3), matrix(seed + 4, 9, 4)
    merged, masks, _ = merge_pair(thin_svd(a, u), thin_svd(b, w), *prior, separation, True, limit)
    assert (product(merged) - u @ a - w @ b).norm() <= 1e-9 * product(merged).norm()
    assert float((masks.content - 1).abs().max()) < 1e-9 and float((masks.style - 1).abs().max()) < 1e-9


@TIGHT
@given(layers(), st.floats(0, 1), st.booleans(), LIMITS)
def test_swapping_roles_and_priors_swaps_masks(pair, separation, keep, limit):
    c, s = both(pair)
    one, masks, m = merge_pair(c, s, 1.5, 0.5, separation, keep, limit)
    two, swapped, _ = merge_pair(s, c, 0.5, 1.5, separation, keep, limit)
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


def projected_gradient(content, style, gauge, p_c, p_s, steps=6000):
    """Minimises the dense objective over masks in the box by FISTA, knowing only matrices."""
    z = torch.full((gauge.up_c.shape[1] + gauge.up_s.shape[1],), 0.5, dtype=F64)
    u, v = torch.cat((gauge.up_c, gauge.up_s), 1), torch.cat((gauge.down_c, gauge.down_s))
    proj_c, proj_s = row_projector(content), row_projector(style)

    def gradient(x):
        dense = u @ (x[:, None] * v)
        error = p_c * (dense - content) @ proj_c + p_s * (dense - style) @ proj_s
        return 2 * ((u.T @ error) * v).sum(1)

    rate = 1 / (2 * float(torch.linalg.eigvalsh((u.T @ u) * (p_c * (v @ proj_c @ v.T) + p_s * (v @ proj_s @ v.T))).max()))
    y, t = z, 1.0
    for _ in range(steps):
        new = (y - rate * gradient(y)).clamp(0, 1)
        t2 = (1 + (1 + 4 * t * t) ** 0.5) / 2
        y, z, t = new + (t - 1) / t2 * (new - z), new, t2
    return u @ (z[:, None] * v)


@settings(max_examples=12, deadline=None)
@given(layers(), st.sampled_from([(1.0, 1.0), (1.5, 1.0), (0.2, 3.0)]))
def test_the_closed_form_is_the_best_in_the_box(pair, prior):
    (a, u), (b, w) = pair
    c, s = both(pair)
    gauge = principal_gauge(c, s)
    found = merge_pair(c, s, *prior, 1.0, keep=False)[0]
    reference = projected_gradient(u @ a, w @ b, gauge, *prior)
    mine, best = (dense_objective(u @ a, w @ b, x, *prior) for x in (product(found), reference))
    scale = float((u @ a).square().sum() + (w @ b).square().sum())
    assert mine <= best + 1e-6 * scale


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
@given(layers(), st.floats(0, 1), st.booleans(), LIMITS)
def test_losses_and_gains_equal_the_dense_frobenius_quantities(pair, separation, keep, limit):
    (a, u), (b, w) = pair
    content, style = u @ a, w @ b
    merged, masks, m = merge_pair(*both(pair), 1.0, 1.0, separation, keep, limit)
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
    half, _, _ = merge_pair(c, s, 1.0, 0.0, 0.5)
    assert (product(half) - product(c.low_rank()) - 0.5 * product(s.low_rank())).norm() < 1e-9


def test_layers_side_by_side_are_solved_as_each_alone():
    pairs = [(svd_of(matrix(i, 7, 5 + i)), svd_of(matrix(i + 9, 7, 3)[:, :1] @ matrix(i, 1, 5 + i))) for i in range(3)]
    each = [moments(principal_gauge(c, s)) for c, s in pairs]
    weights = torch.tensor([[1.0], [2.0], [0.5]], dtype=F64)
    together = masks_at(stack(each), weights, 1.0, 0.6, True, 1e-9)
    for i, m in enumerate(each):
        alone = masks_at(m, float(weights[i]), 1.0, 0.6, True, 1e-9)
        assert torch.allclose(together.content[i, : m.alpha.numel()], alone.content)
        assert torch.allclose(together.style[i, : m.beta.numel()], alone.style)


@pytest.mark.parametrize("keep", [True, False])
def test_keep_strength_never_takes_away_and_stays_below_its_limit(keep):
    m = moments(principal_gauge(svd_of(matrix(3, 9, 6)), svd_of(matrix(4, 9, 6))))
    plain, kept = (masks_at(m, 1.0, 1.0, 1.0, k, 1e-9) for k in (False, keep))
    ratio = torch.cat((kept.content / plain.content, kept.style / plain.style))
    assert float(ratio.min()) >= 1 - 1e-12 and float(ratio.max()) <= 1.25 + 1e-12
    assert isinstance(kept, Masks)
