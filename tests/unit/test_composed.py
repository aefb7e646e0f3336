"""Mode fast's way over small matrices, against the same merge in float64 by the long way, layer by layer."""

from __future__ import annotations

import pytest
import torch
from styleloom.weights.lora.algebra import thin_svd
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.lora.reading import CanonicalLoRA
from styleloom.weights.merge import composed, fast
from styleloom.weights.merge.ziprank import DUAL_GAIN, merge_pair

F64 = torch.float64
TARGETS = [f"layer {i}" for i in range(5)]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def lora(seed: int, rank: int, cosine: float = 0.0, decay: float = 1.0, scale: float = 1.0) -> CanonicalLoRA:
    """A LoRA of which half the input directions lie at `cosine` to those of the others made here; its directions fall
    off by `decay`."""
    adapters = {}
    for index, target in enumerate(TARGETS):
        down, near = random(100 * seed + index, rank, 40), random(index, 12, 40)
        n = rank // 2
        down[:n] = cosine * near[:n] + (1 - cosine**2) ** 0.5 * down[:n]
        up = random(7000 + 100 * seed + index, 30, rank) * torch.logspace(0, torch.tensor(decay).log10(), rank)
        adapters[target] = LowRank(down.half(), up.half(), (), scale)
    return CanonicalLoRA(f"lora {seed}", adapters, stems={target: target for target in TARGETS})


def axes(first: int, cosine: float, signs: tuple[float, ...]) -> CanonicalLoRA:
    """A LoRA whose six input directions all lie at the same cosine to an axis, from axis 0 on, and else along other
    axes, from `first` on; its outputs are those of any other one made here, with these signs, and some of its own."""
    down = cosine * torch.eye(40, dtype=F64)[:6] + (1 - cosine**2) ** 0.5 * torch.eye(40, dtype=F64)[first : first + 6]
    adapters = {}
    for index, target in enumerate(TARGETS):
        up = random(index, 30, 6) * torch.tensor(signs) + 0.3 * random(50 + index, 30, 6) * (1 - cosine)
        adapters[target] = LowRank(down.half(), up.half())
    return CanonicalLoRA("axes", adapters, stems={target: target for target in TARGETS})


def steep(given: CanonicalLoRA) -> CanonicalLoRA:
    """The same changes, with `down` falling off and `up` growing instead."""
    by = 2.0 ** -torch.arange(6)
    for target, adapter in given.adapters.items():
        given.adapters[target] = LowRank(adapter.down * by[:, None].half(), adapter.up / by.half())
    return given


def product(pair) -> torch.Tensor:
    return pair.up.double() @ pair.down.double()


CASES = {
    "equal ranks": (lora(1, 6, 0.7), lora(2, 6, 0.7)),
    "more content": (lora(1, 8, 0.7, scale=0.5), lora(2, 3, 0.7)),
    "more style": (lora(1, 3), lora(2, 8, 0.9)),
    "equal cosines": (axes(10, 1.0, (1, 1, 1, 1, 1, 1)), axes(10, 0.9, (1, -1, 1, -1, 2, -2))),
    "nothing shared": (axes(10, 1.0, (1, 1, 1, 1, 1, 1)), axes(10, 0.0, (1, -1, 1, -1, 2, -2))),
    "ups that fall off: float64 Grams": (lora(1, 6, 0.7, 1e-2), lora(2, 6, 0.7)),
    "downs that fall off: float64 Grams": (steep(lora(1, 6, 0.7)), lora(2, 6, 0.7)),
    "ups that fall below what is kept: the long way": (lora(1, 6, 0.7, 1e-6), lora(2, 6, 0.7)),
    "the same inputs: the long way": (lora(1, 6, 1.0), lora(2, 6, 1.0)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keep", [True, False])
def test_each_layer_is_the_long_way_in_float64(case, keep):
    loras, strengths, prior = CASES[case], (0.8, -1.2), (1.5, 1.0)
    merged = fast.merge_fast(*loras, strengths, lambda target: prior, 0.7, keep)
    for target in TARGETS:
        changes = []
        for each, strength in zip(loras, strengths):
            adapter = each.adapters[target]
            changes.append(thin_svd(adapter.down.double(), adapter.up.double() * adapter.scale * strength, 1e-4))
        due, _, m = merge_pair(*changes, *prior, 0.7, keep, DUAL_GAIN)
        made, report = merged.adapters[target], merged.reports[target]
        assert made.rank == due.rank == report.rank
        # The masks' ridge (1e-6 in float32) and Grams in float32 differ from float64's.
        assert (product(made) - product(due)).norm() <= 2e-4 * product(due).norm()
        assert abs(report.size - float(product(due).norm())) <= 2e-4 * report.size
        left, right = made.up.norm(dim=0), made.down.norm(dim=1)
        assert torch.allclose(left, right, rtol=1e-3), "the size of a direction stands evenly on both sides"


def test_separation_zero_is_the_plain_sum():
    loras = CASES["more content"]
    merged = fast.merge_fast(*loras, (1.0, 1.0), lambda target: (1.5, 1.0), 0.0, True)
    for target in TARGETS:
        due = sum(each.adapters[target].scale * product(each.adapters[target]) for each in loras)
        assert (product(merged.adapters[target]) - due).norm() <= 1e-5 * due.norm()


@pytest.mark.parametrize("case, long", [(case, "long" in case) for case in CASES])
def test_which_layers_go_the_long_way(case, long):
    pairs = {target: fast.pair_of(target, CASES[case], (1.0, 1.0), 0) for target in TARGETS}
    found = composed.merge_few(pairs, torch.ones(len(TARGETS), 2, dtype=F64), 0.7, True, None)
    assert list(found) == ([] if long else TARGETS)


def test_a_layer_is_the_same_beside_others():
    pairs = {target: fast.pair_of(target, CASES["equal ranks"], (1.0, 1.0), 0) for target in TARGETS}
    together = composed.merge_few(pairs, torch.ones(len(TARGETS), 2, dtype=F64), 0.7, True, None)
    for target in TARGETS:
        alone, _ = composed.merge_few({target: pairs[target]}, torch.ones(1, 2, dtype=F64), 0.7, True, None)[target]
        made, _ = together[target]
        assert (product(made) - product(alone)).norm() <= 1e-6 * product(alone).norm()


def test_a_layer_that_the_prior_takes_from_one_lora_is_the_other_lora_whole():
    content, style = CASES["equal ranks"]
    merged = fast.merge_fast(content, style, (1.0, 1.0), lambda target: (0.0, 1.0), 0.7, True)
    for target in TARGETS:
        made, due = merged.adapters[target], product(style.adapters[target])
        assert made.rank == 6 and (product(made) - due).norm() <= 1e-5 * due.norm()


@pytest.mark.parametrize("threads", [2, 3])
def test_the_bits_do_not_depend_on_the_number_of_threads(threads):
    def run(count: int):
        torch.set_num_threads(count)
        merged = fast.merge_fast(*CASES["equal ranks"], (1.0, 1.0), lambda target: (1.5, 1.0), 0.7, True)
        return [(made.down, made.up) for made in merged.adapters.values()]

    before = torch.get_num_threads()
    try:
        for one, other in zip(run(1), run(threads)):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    finally:
        torch.set_num_threads(before)
