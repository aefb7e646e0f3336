"""Row-wise adapters against merged weights in float64, with no host at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.row_adapters.forward import LayersWithTerms, ModelCall
from styleloom.weights.row_adapters.layers import layer_of
from styleloom.weights.row_adapters.low_rank import LowRankTerm, Observer
from styleloom.weights.row_adapters.rows import BATCH, NEGATIVE, POSITIVE, TILED, TWICE, UnknownRows, spans
from styleloom.weights.row_adapters.terms import (
    BiasDifference,
    ConvLowRank,
    Difference,
    InputAndOutput,
    Kronecker,
    OutputTransform,
)

D = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape)), dtype=D)


def through(module, term, x, strength=0.7):
    """The layer with one term on all rows."""
    strengths = (strength,)
    y = module(term.enter(x, strengths))
    term.leave(x, y, strengths, module)
    return y


def merged(module, x, weight, bias=None):
    other = type(module)(*_arguments(module)).to(D)
    other.weight.data, other.bias.data = weight, module.bias.data if bias is None else bias
    return other(x)


def _arguments(module):
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    return (
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
    )


def linear(inside=12, outside=8):
    return torch.nn.Linear(inside, outside).to(D)


CONVS = {
    "pointwise": lambda: torch.nn.Conv2d(6, 8, 1),
    "kernel": lambda: torch.nn.Conv2d(6, 8, 3, padding=1),
    "stride": lambda: torch.nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "dilation": lambda: torch.nn.Conv2d(6, 8, (3, 1), dilation=2),
    "1d": lambda: torch.nn.Conv1d(6, 8, 3, padding=1),
    "3d": lambda: torch.nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1)),
}


def picture(module, rows=2):
    return normal(rows, module.in_channels, *(6 for _ in module.kernel_size))


@given(
    order=st.lists(st.sampled_from([POSITIVE, NEGATIVE]), min_size=1, max_size=6).map(tuple),
    per=st.integers(1, 3),
    tiled=st.booleans(),
)
def test_spans_name_each_row_once_and_in_order(order, per, tiled):
    batch = per * len(order)
    for rows in (batch, 2 * batch):
        layout = TILED if tiled else BATCH
        if rows != batch and not tiled and len(set(order)) > 1:
            with pytest.raises(UnknownRows):
                spans(order, batch, rows, layout)
            continue
        found = [branch for branch, start, length in spans(order, batch, rows, layout) for _ in range(length)]
        each = [branch for branch in order for _ in range(per)] * (rows // batch)
        assert found == each
        starts = [start for _, start, _ in spans(order, batch, rows, layout)]
        assert starts == sorted(starts)


def test_one_branch_alone_needs_no_arrangement():
    assert spans((NEGATIVE, NEGATIVE), 2, 77) == ((NEGATIVE, 0, 77),)
    with pytest.raises(UnknownRows, match="77 rows for a batch of 2"):
        spans((POSITIVE, NEGATIVE), 2, 77)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    strengths=st.lists(st.sampled_from([0.0, 1.0, -0.4, 2.0]), min_size=4, max_size=4),
    cut=st.integers(1, 7),
    shape=st.sampled_from([(2, 12), (2, 5, 12), (1, 2, 3, 12)]),
)
def test_stacked_pairs_on_parts_of_the_output(ranks, strengths, cut, shape):
    module, x = linear(), normal(*shape)
    parts = [None, (0, cut), (cut, 8 - cut), None]
    pairs, weight = [], module.weight.data.clone()
    for i, rank in enumerate(ranks):
        rows = 8 if parts[i] is None else parts[i][1]
        down, up = normal(rank, 12, seed=i), normal(rows, rank, seed=i)
        pairs.append((LowRank(down, up, (), 0.5, parts[i]), i))
        start = 0 if parts[i] is None else parts[i][0]
        weight[start : start + rows] += strengths[i] * 0.5 * up @ down
    y = module(x)
    LowRankTerm(layer_of(module), pairs).leave(x, y, tuple(strengths), module)
    torch.testing.assert_close(y, merged(module, x, weight))


def test_a_part_of_the_input():
    module, x = linear(), normal(2, 3, 12)
    down, up = normal(3, 5), normal(8, 3)
    weight = module.weight.data.clone()
    weight[:, 4:9] += 0.7 * 2 * up @ down
    term = LowRankTerm(layer_of(module), [(LowRank(down, up, (), 2.0, None, (4, 5)), 0)])
    torch.testing.assert_close(through(module, term, x), merged(module, x, weight))


def test_an_output_that_is_no_block_of_memory():
    """Some layers return a view; the addition finds its place all the same."""
    module, x = linear(), normal(2, 5, 12)
    down, up = normal(3, 12), normal(4, 3)
    term = LowRankTerm(layer_of(module), [(LowRank(down, up, (), 1.0, (2, 4)), 0)])
    y = module(x).transpose(0, 1).contiguous().transpose(0, 1)
    assert not y.is_contiguous()
    term.leave(x, y, (1.0,), module)
    expected = module(x)
    expected[..., 2:6] += x @ down.T @ up.T
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("core", [False, True])
def test_low_rank_on_convolutions(conv, core):
    module = CONVS[conv]().to(D)
    kernel, x = module.kernel_size, picture(module)
    ones = tuple(1 for _ in kernel)
    if core:
        down, mid, up = normal(3, 6, *ones), normal(3, 3, *kernel), normal(8, 3, *ones)
        change = torch.einsum("oa,ab...,bi->oi...", up.flatten(1), mid, down.flatten(1))
    else:
        down, mid, up = normal(3, 6, *kernel), None, normal(8, 3, *ones)
        change = torch.einsum("oa,ai...->oi...", up.flatten(1), down)
    term = ConvLowRank(layer_of(module), 0, down, up, mid, 0.5)
    torch.testing.assert_close(through(module, term, x), merged(module, x, module.weight.data + 0.35 * change))


@pytest.mark.parametrize("conv", CONVS)
def test_dense_bias_glora_and_turn_on_convolutions(conv):
    module = CONVS[conv]().to(D)
    layer, x, weight = layer_of(module), picture(module), module.weight.data
    change = normal(*weight.shape)
    torch.testing.assert_close(
        through(module, Difference(layer, 0, change), x), merged(module, x, weight + 0.7 * change)
    )
    bias = normal(8)
    torch.testing.assert_close(
        through(module, BiasDifference(layer, 0, bias), x), merged(module, x, weight, module.bias.data + 0.7 * bias)
    )
    a_down, a_up, b_down, b_up = normal(2, 6), normal(6, 2), normal(2, *weight.shape[1:]), normal(8, 2)
    through_a = torch.einsum("oi...,ij->oj...", weight, a_up @ a_down)
    expected = weight + 0.7 * 0.5 * (through_a + torch.einsum("or,ri...->oi...", b_up, b_down))
    torch.testing.assert_close(
        through(module, InputAndOutput(layer, 0, a_down, a_up, b_down, b_up, 0.5), x), merged(module, x, expected)
    )
    turn = normal(8, 8)
    expected = weight + 0.7 * torch.einsum("op,pi...->oi...", turn, weight)
    term = OutputTransform(layer, 0, lambda held, strength, like: strength * held[0], holds=[turn])
    torch.testing.assert_close(through(module, term, x), merged(module, x, expected))


@pytest.mark.parametrize("factored", [False, True])
def test_kronecker(factored):
    module, x = linear(), normal(2, 3, 12)
    first, second = (
        ((normal(2, 3), normal(3, 4)), (normal(4, 2), normal(2, 3))) if factored else ((normal(2, 4),), (normal(4, 3),))
    )
    w1, w2 = (pair[0] if len(pair) == 1 else pair[0] @ pair[1] for pair in (first, second))
    term = Kronecker(layer_of(module), 0, first, second, 0.5)
    torch.testing.assert_close(
        through(module, term, x), merged(module, x, module.weight.data + 0.35 * torch.kron(w1, w2))
    )


@pytest.mark.parametrize(
    "norm", [torch.nn.LayerNorm(6), torch.nn.RMSNorm(6), torch.nn.GroupNorm(2, 6)], ids=["layer", "rms", "group"]
)
def test_norms(norm):
    norm = norm.to(D)
    x = normal(2, 6, 5) if isinstance(norm, torch.nn.GroupNorm) else normal(2, 5, 6)
    layer, change = layer_of(norm), normal(6)
    found = through(norm, Difference(layer, 0, change), x)
    norm.weight.data += 0.7 * change
    torch.testing.assert_close(found, norm(x))


def test_layers_that_share_an_input_share_a_product(monkeypatch):
    """What three layers get as one object is multiplied once, from the second pass on; with the same result."""
    modules = [linear() for _ in range(3)]
    terms = [
        LowRankTerm(layer_of(m), [(LowRank(normal(2, 12, seed=i), normal(8, 2, seed=i)), 0)]) for i, m in enumerate(modules)
    ]
    x = normal(4, 5, 12)

    def run(terms, x):
        made = []
        for module, term in zip(modules, terms, strict=True):
            y = module(x)
            term.add(x, x[1:3], y[1:3], (1.0,))
            made.append(y)
        return made

    observer, expected = Observer(), run(terms, x)
    for term in terms:
        observer.see(term, x)
    (shared,) = observer.groups()
    products = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda *a, **k: (products.append(a[1].shape), original(*a, **k))[1])
    found = run(terms, x)
    assert products.count(torch.Size([6, 12])) == 1 and torch.Size([2, 12]) not in products
    monkeypatch.undo()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        run(terms, 2 * x)[2][1:3], modules[2](2 * x)[1:3] + 2 * x[1:3] @ terms[2].down.T @ terms[2].up0.T
    )
    shared.undo()
    for one, other in zip(run(terms, x), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(term.shared is None for term in terms)


def test_layers_of_unlike_inputs_and_layers_called_twice_share_nothing():
    modules = [linear() for _ in range(2)]
    a, b = (LowRankTerm(layer_of(m), [(LowRank(normal(2, 12), normal(8, 2)), 0)]) for m in modules)
    x = normal(1, 12)
    apart, twice = Observer(), Observer()
    apart.see(a, x)
    apart.see(b, x.clone())
    assert apart.groups() == []
    for term in (a, b, a):
        twice.see(term, x)
    assert twice.groups() == []


def test_a_layer_says_what_it_is():
    assert layer_of(torch.nn.Embedding(3, 4)) is None
    assert layer_of(torch.nn.Conv2d(2, 2, 3, padding_mode="circular")) is None
    assert layer_of(torch.nn.ConvTranspose2d(2, 2, 3)) is None
    grouped = layer_of(torch.nn.Conv2d(4, 6, 3, groups=2, bias=False))
    assert (grouped.shape, grouped.groups, grouped.bias) == ((6, 2, 3, 3), 2, False)
    assert dataclasses.replace(layer_of(linear()), shape=(4, 12)).shape == (4, 12)


# --- the forward of a layer with terms


def call_of(order, batch, strengths):
    call = ModelCall()
    call.set_rows(order, batch, strengths, tuple(strengths))
    call.active = True
    return call


def test_each_call_has_its_own_rows():
    """What a call worked out for a number of rows says nothing of the next one."""
    strengths = {POSITIVE: (1.0,), NEGATIVE: (1.0,)}
    call = call_of((POSITIVE, NEGATIVE), 4, strengths)
    assert call.runs(torch.zeros(4, 1)) == (0, ((POSITIVE, 0, 2), (NEGATIVE, 2, 2)))
    call.set_rows((NEGATIVE, POSITIVE), 4, strengths, (POSITIVE,))
    assert call.runs(torch.zeros(4, 1)) == (0, ((POSITIVE, 2, 2),))


def test_twice_the_batch_is_refused_unless_the_model_is_known_to_tile():
    order = (POSITIVE, NEGATIVE)
    with pytest.raises(UnknownRows):
        spans(order, 2, 4)
    assert spans(order, 2, 4, TWICE) == ((0, 0, 1), (1, 1, 1), (0, 2, 1), (1, 3, 1))
    with pytest.raises(UnknownRows):
        spans(order, 2, 6, TWICE)


@pytest.mark.parametrize("watched", [False, True])
def test_a_layer_with_terms_on_both_sides(watched):
    """Positive rows: a LoRA, then a GLoRA, which changes the input of both; negative rows: another LoRA. Against
    merged weights, in the order of merging."""
    module = torch.nn.Linear(6, 5, dtype=D).requires_grad_(False)
    layer, weight, x = layer_of(module), module.weight.clone(), normal(4, 3, 6)
    pairs = [LowRank(normal(2, 6, seed=i), normal(5, 2, seed=i)) for i in (1, 2)]
    a_down, a_up, b_down, b_up = normal(2, 6, seed=3), normal(6, 2, seed=4), normal(2, 6, seed=5), normal(5, 2, seed=6)
    terms = {
        POSITIVE: [LowRankTerm(layer, [(pairs[0], 0)]), InputAndOutput(layer, 1, a_down, a_up, b_down, b_up, 0.5)],
        NEGATIVE: [LowRankTerm(layer, [(pairs[1], 0)])],
    }
    call = call_of((POSITIVE, NEGATIVE), 4, {POSITIVE: (0.7, 1.3), NEGATIVE: (-0.4,)})
    if watched:
        call.called, call.observers = set(), {POSITIVE: Observer(), NEGATIVE: Observer()}
    layers = LayersWithTerms(lambda name: module, {"layer": terms}, call)
    for _ in range(2):  # as often as wanted
        layers.put_in()
        made = module(x)
        layers.take_out()
        assert "forward" not in module.__dict__
    with_lora = weight + 0.7 * pairs[0].up @ pairs[0].down
    positive = with_lora + 1.3 * 0.5 * (with_lora @ a_up @ a_down + b_up @ b_down)
    negative = weight - 0.4 * pairs[1].up @ pairs[1].down
    due = torch.cat([x[:2] @ positive.T, x[2:] @ negative.T]) + module.bias
    torch.testing.assert_close(made, due)
    torch.testing.assert_close(module(x), x @ weight.T + module.bias)
    assert call.called == ({"layer"} if watched else None)


def test_a_module_of_two_names_is_left_as_it_was():
    """Each name has terms of its own; both act, and nothing of them stays."""
    module = torch.nn.Linear(6, 5, dtype=D).requires_grad_(False)
    x, layer = normal(4, 3, 6), layer_of(module)
    pairs = [LowRank(normal(2, 6, seed=i), normal(5, 2, seed=i)) for i in (1, 2)]
    terms = {str(i): {POSITIVE: [LowRankTerm(layer, [(pair, 0)])]} for i, pair in enumerate(pairs)}
    layers = LayersWithTerms(lambda name: module, terms, call_of((POSITIVE,), 4, {POSITIVE: (1.0,)}))
    before = module(x)
    layers.put_in()
    torch.testing.assert_close(module(x), before + sum(x @ pair.down.T @ pair.up.T for pair in pairs))
    layers.take_out()
    assert "forward" not in module.__dict__
    assert torch.equal(module(x), before)


def test_layers_whose_input_a_term_changes_share_no_product():
    """q and k of a block get one tensor, and a GLoRA of each changes it for its own layer: what the first has computed
    from its rows is not what the second needs. Where nothing changes it, one product does for both."""
    modules = [torch.nn.Linear(6, 5, dtype=D).requires_grad_(False) for _ in range(2)]
    x = normal(4, 3, 6)
    for changing in (True, False):
        call, terms, due = call_of((POSITIVE,), 4, {POSITIVE: (0.7, 1.3)}), {}, []
        for number, module in enumerate(modules):
            layer, seed = layer_of(module), 10 * number
            pair = LowRank(normal(2, 6, seed=seed), normal(5, 2, seed=seed))
            terms[str(number)] = {POSITIVE: [LowRankTerm(layer, [(pair, 0)])]}
            weight = module.weight + 0.7 * pair.up @ pair.down
            if changing:
                sides = [normal(*shape, seed=seed + 5) for shape in ((2, 6), (6, 2), (2, 6), (5, 2))]
                terms[str(number)][POSITIVE].append(InputAndOutput(layer, 1, *sides, 0.5))
                weight = weight + 0.65 * (weight @ sides[1] @ sides[0] + sides[3] @ sides[2])
            due.append(x @ weight.T + module.bias)
        layers = LayersWithTerms(lambda name: modules[int(name)], terms, call)
        observer = Observer()
        call.called, call.observers = set(), {POSITIVE: observer}
        layers.put_in()
        first = [module(x) for module in modules]
        call.called = call.observers = None
        (shared,) = observer.groups()
        asked = []
        shared.hidden = lambda *args, ask=shared.hidden: (asked.append(args), ask(*args))[1]
        second = [module(x) for module in modules]
        layers.take_out()
        assert len(asked) == (0 if changing else 2)
        for found in (first, second):
            torch.testing.assert_close(found, due)
