"""The baselines against dense formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.lora.algebra import cut, thin_svd
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.merge.measure import own_input, sum_size
from styleloom.weights.merge.methods import METHODS, Options
from styleloom.weights.merge.methods.common import best_factors
from styleloom.weights.merge.methods.ties import combined, trimmed
from styleloom.weights.merge.methods.ziplora import column_masks

F64 = torch.float64
QUICK = settings(max_examples=25, deadline=None)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@st.composite
def changes(draw, most=3):
    seed, count = draw(st.integers(0, 10**6)), draw(st.integers(2, most))
    ranks = [draw(st.integers(1, 4)) for _ in range(count)]
    return [random(seed + 9 * i, 10, r) @ random(seed + 9 * i + 5, r, 14) for i, r in enumerate(ranks)]


def svds(dense):
    return [thin_svd(d, torch.eye(10, dtype=F64), 1e-9) for d in dense]


def run(method, dense, **options):
    pair, _ = METHODS[method](svds(dense), Options(**options))
    return pair.up @ pair.down


def projector(dense):
    _, s, vh = torch.linalg.svd(dense, full_matrices=False)
    v = vh[s > 1e-9 * s[0]]
    return v.T @ v


@QUICK
@given(changes())
def test_sum_average_and_svd(dense):
    total = sum(dense)
    assert torch.allclose(run("sum", dense), total)
    assert torch.allclose(run("average", dense), total / len(dense))
    assert torch.allclose(run("average", dense, count=5), total / 5), "LoRAs that lack the layer count as zero"
    rank = max(int(torch.linalg.matrix_rank(d)) for d in dense)
    u, s, vh = torch.linalg.svd(total)
    assert torch.allclose(run("SVD", dense), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-6)


@QUICK
@given(changes(most=2), st.floats(0.1, 4))
def test_np_lora(dense, mu):
    content, style = dense
    due = style + content @ (torch.eye(14, dtype=F64) - mu / (1 + mu) * projector(style))
    assert torch.allclose(run("NP-LoRA", dense, mu=mu), due)


@QUICK
@given(changes())
def test_router_meets_every_lora_on_its_own_inputs(dense):
    found = run("router", dense, ridge=1e-9)
    union = torch.cat([projector(d) for d in dense])
    if int(torch.linalg.matrix_rank(union)) == sum(int(torch.linalg.matrix_rank(d)) for d in dense):
        for d in dense:
            assert torch.allclose(found @ projector(d), d, atol=1e-3 * float(d.abs().max()))


@QUICK
@given(changes(), st.floats(0.05, 1))
def test_router_is_the_optimum_of_its_ridge_problem(dense, ridge):
    down = torch.cat([s.down for s in svds(dense)])
    up = torch.cat([s.up * s.values for s in svds(dense)], 1)
    grams = [down @ projector(d) @ down.T for d in dense]
    floor = ridge * float(sum(g.trace() for g in grams)) / len(down)
    own = [down @ projector(d) @ d.T for d in dense]  # V P_k L_kᵀ
    due = sum(own).T @ torch.linalg.inv(sum(grams) + floor * torch.eye(len(down), dtype=F64)) @ down
    assert up.shape[1] == len(down)
    assert torch.allclose(run("router", dense, ridge=ridge), due, atol=1e-6 * float(due.abs().max()))


def columns_problem(dense):
    """(Q, g) of Σ_k ‖(Σ_j L_j diag(m_j) − L_k) P_k‖² = mᵀ Q m − 2 gᵀ m + …, from dense matrices."""
    stacked = torch.cat(dense, 1)
    projectors = [projector(d) for d in dense]
    big = sum((stacked.T @ stacked) * torch.kron(torch.ones(len(dense), len(dense), dtype=F64), p) for p in projectors)
    right = sum(torch.cat([(d.T @ own * p).sum(1) for d in dense]) for own, p in zip(dense, projectors))
    return big, right


@QUICK
@given(changes(), st.sampled_from([None, 1.0, 0.999]))
def test_ziploras_columns_are_the_optimum_within_their_bounds(dense, alike):
    if alike:  # inputs (nearly) alike: the free optimum has masks far outside, and many times the size of the sum
        dense[1] = random(5, 10, 10) @ (alike * dense[0] + (1 - alike**2) ** 0.5 * random(6, 10, 14))
    masks = column_masks(svds(dense))
    assert float(masks.min()) >= 0 and float(masks.max()) <= 2
    big, right = columns_problem(dense)
    slope = 2 * (big @ masks.flatten() - right)
    # The certificate of a convex problem: no masks in [0, 2] have a loss that is lower by more than this.
    gap = float((slope * (masks.flatten() - 2 * (slope < 0))).sum())
    assert gap <= 1.01e-3 * float(sum(d.square().sum() for d in dense))
    due = sum(d * m for d, m in zip(dense, masks))
    assert torch.allclose(run("ZipLoRA columns", dense), due, atol=1e-8 * float(due.abs().max()))


@QUICK
@given(changes(most=2), st.integers(0, 10**6))
def test_np_lora_of_three_keeps_the_first_out_of_the_span_of_the_others(dense, seed):
    one, two = dense
    three = random(seed, 10, 10) @ two  # reads what the second reads: rows that depend on each other
    both = projector(torch.cat((two, three)))
    share = 0.5 / 1.5
    due = three + two @ (torch.eye(14, dtype=F64) - share * projector(three)) + one - share * one @ both
    assert torch.allclose(run("NP-LoRA", [one, two, three]), due, atol=1e-7 * float(due.abs().max()))


@QUICK
@given(changes(), st.sampled_from(["TIES", "DARE", "SVD"]), st.integers(1, 6))
def test_methods_that_cut_say_what_they_keep(dense, method, rank):
    most = {"SVD": 1000}.get(method, 10)
    whole = run(method, dense, rank=most, seed=3) if method != "SVD" else sum(dense)
    pair, energy = METHODS[method](svds(dense), Options(rank=rank, seed=3))
    left = float((pair.up @ pair.down).square().sum() / whole.square().sum())
    assert abs(energy - left) < 1e-3, "the range finder is near the best"
    lost = float((pair.up @ pair.down - whole).square().sum() / whole.square().sum())
    assert abs(1 - energy - lost) < 1e-3


@QUICK
@given(changes())
def test_the_size_of_the_plain_sum(dense):
    assert abs(sum_size(svds(dense)) - float(sum(dense).norm())) < 1e-9 * float(sum(d.norm() for d in dense))


@QUICK
@given(changes(), st.floats(0.1, 1))
def test_ties_entry_by_entry(dense, density):
    kept = [trimmed(d, density) for d in dense]
    for matrix, original in zip(kept, dense):
        left = matrix != 0
        assert abs(int(left.sum()) - density * 140) <= 1
        assert float(original.abs()[left].min()) >= float(original.abs()[~left].max() if (~left).any() else 0)
    found = combined(kept)
    for i in range(10):
        for j in range(14):
            values = [float(m[i, j]) for m in kept]
            sign = (sum(values) > 0) - (sum(values) < 0)
            same = [v for v in values if v * sign > 0]
            assert abs(float(found[i, j]) - (sum(same) / len(same) if same else 0)) < 1e-12
    assert torch.allclose(run("TIES", dense, density=density, rank=10), found, atol=1e-8)


def test_dare_keeps_the_mean_and_depends_on_the_seed_alone():
    dense = [random(1, 10, 2) @ random(2, 2, 14), random(3, 10, 2) @ random(4, 2, 14)]
    many = torch.stack([run("DARE", dense, density=0.5, rank=10, seed=s) for s in range(400)])
    assert (many.mean(0) - sum(dense)).norm() < 0.15 * sum(dense).norm()
    assert torch.equal(many[7], run("DARE", dense, density=0.5, rank=10, seed=7))
    assert not torch.equal(many[7], many[8])
    assert torch.allclose(run("DARE", dense, density=1.0, rank=10), sum(dense))


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_range_finder_is_near_the_best(rank):
    matrix = random(5, 120, 90)
    pair, energy = best_factors(matrix, rank, torch.Generator().manual_seed(0))
    assert abs(energy - float((pair.up @ pair.down).square().sum() / matrix.square().sum())) < 1e-12
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    assert pair.rank == rank and (pair.up @ pair.down - matrix).norm() < 1.02 * best


@QUICK
@given(changes(), st.floats(0.2, 1), st.integers(0, 6))
def test_cut_keeps_the_energy_or_the_rank(dense, energy, rank):
    total = sum(dense)
    pair, kept = cut(LowRank(total, torch.eye(10, dtype=F64)), rank, energy)
    power = torch.linalg.svdvals(total).square()
    share = power.cumsum(0) / power.sum()
    need = int((share < energy - 1e-9).sum()) + 1 if energy < 1 else 10
    if energy < 1 or rank:
        assert pair.rank <= (min(need, rank) if rank else need)
    error = float((pair.up @ pair.down - total).square().sum() / total.square().sum())
    assert abs(1 - error - kept) < 1e-6


@QUICK
@given(changes(most=2))
def test_own_input_measures_the_dense_quantities(dense):
    one, two = dense
    merged = LowRank(one + 0.5 * two, torch.eye(10, dtype=F64))
    share, loss = own_input(merged, svds([one])[0])
    seen = (one + 0.5 * two) @ projector(one)
    assert abs(share - float((seen * one).sum() / one.square().sum())) < 1e-8
    assert abs(loss - float((seen - one).square().sum() / one.square().sum())) < 1e-8
