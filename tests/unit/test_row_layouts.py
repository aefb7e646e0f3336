"""How the rows of the batch stand in a layer: by the table, and found out by running; against merged weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.row_adapters.forward import LayersWithTerms, ModelCall
from styleloom.weights.row_adapters.layers import layer_of
from styleloom.weights.row_adapters.layouts import Layouts, Split, layouts_of
from styleloom.weights.row_adapters.low_rank import LowRankTerm
from styleloom.weights.row_adapters.probe import Seen, changed, found, layouts_found
from styleloom.weights.row_adapters.rows import (
    BATCH,
    CHUNKS,
    EACH,
    NEGATIVE,
    ONE_FOR_ALL,
    ONE_MORE,
    POSITIVE,
    TILED,
    TWICE,
    Layout,
    UnknownRows,
    spans,
)

D, WIDTH = torch.float64, 5
STRENGTHS = {POSITIVE: (0.8,), NEGATIVE: (-0.4,)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=D)


# what a model does with its input (batch, 3, WIDTH) around one layer
SHAPES = {
    "batch": (lambda x, layer: layer(x), BATCH),
    "each": (lambda x, layer: layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]), EACH),
    "tiled": (lambda x, layer: layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, len(x))).transpose(0, 1), TILED),
    "second axis": (lambda x, layer: layer(x.transpose(0, 1)).transpose(0, 1), Layout("batch", 1)),
    "side by side": (lambda x, layer: layer(x.reshape(1, -1, WIDTH)).reshape(x.shape), Layout("each", 1)),
}


class Net(torch.nn.Module):
    def __init__(self, through):
        super().__init__()
        self.layer, self.through = torch.nn.Linear(WIDTH, WIDTH).to(D), through

    def forward(self, x):
        return self.through(x, self.layer)


def terms_for(layer):
    made = {}
    for branch in (POSITIVE, NEGATIVE):
        down, up = normal(2, WIDTH, seed=branch), normal(WIDTH, 2, seed=9 + branch)
        made[branch] = [LowRankTerm(layer_of(layer), [(LowRank(down, up, (), 1.0, None), 0)])]
    return made


def merged(net, x, branch):
    """The rows of one branch through a net of their own."""
    down, up = normal(2, WIDTH, seed=branch), normal(WIDTH, 2, seed=9 + branch)
    weight = net.layer.weight + STRENGTHS[branch][0] * up @ down
    return net.through(x, lambda value: F.linear(value, weight, net.layer.bias))


def truth(net, x, order):
    each = len(x) // len(order)
    return torch.cat([merged(net, part, branch) for part, branch in zip(x.split(each), order, strict=True)])


def run(net, x, order, layouts=None, splits=(), watched=False):
    call = ModelCall(layouts)
    layers = LayersWithTerms(lambda name: net.get_submodule(name), {"layer": terms_for(net.layer)}, call, splits)
    layers.put_in()
    try:
        call.set_rows(order, len(x), STRENGTHS, tuple(STRENGTHS))
        call.active, call.called = True, set() if watched else None
        return net(x)
    finally:
        layers.take_out()
        assert "forward" not in net.layer.__dict__ and "forward" not in net.__dict__


@pytest.mark.parametrize("watched", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_of_every_layout(shape, watched):
    through, layout = SHAPES[shape]
    net, x, order = Net(through), normal(4, 3, WIDTH), (NEGATIVE, POSITIVE)
    made = run(net, x, order, Layouts(((r"^layer$", layout),)), watched=watched)
    torch.testing.assert_close(made, truth(net, x, order))
    if shape != "batch":
        with pytest.raises(UnknownRows, match="in layer"):
            run(net, x, order, Layouts())


def test_one_row_for_everybody():
    net = Net(lambda x, layer: x + layer(x.new_ones(1, WIDTH)).unsqueeze(1))
    x, order = normal(4, 3, WIDTH), (POSITIVE, NEGATIVE)
    made = run(net, x, order, Layouts(((r"^layer$", ONE_FOR_ALL),)))
    torch.testing.assert_close(made, truth(net, x, order))


def test_a_part_that_mixes_rows_runs_once_for_each_branch():
    """A layer whose rows are sorted by what stands in them; the whole net is the part."""

    def sorted_rows(x, layer):
        flat = x.flatten(0, 1)
        order = flat[:, 0].argsort()
        return layer(flat[order])[order.argsort()].reshape(x.shape)

    net, x, order = Net(sorted_rows), normal(6, 3, WIDTH), (POSITIVE, NEGATIVE, POSITIVE)
    made = run(net, x, order, splits=[("", Split("", (0,)))])
    torch.testing.assert_close(made, truth(net, x, order))


@settings(max_examples=50, deadline=None)
@given(
    order=st.lists(st.sampled_from([POSITIVE, NEGATIVE]), min_size=2, max_size=5).map(tuple),
    per=st.integers(1, 3),
    times=st.integers(1, 3),
    layout=st.sampled_from([EACH, TILED]),
)
def test_spans_of_multiples(order, per, times, layout):
    batch = per * len(order)
    named = [branch for branch in order for _ in range(per)]
    expected = named * times if layout is TILED else [branch for branch in named for _ in range(times)]
    made = [branch for branch, _, length in spans(order, batch, batch * times, layout) for _ in range(length)]
    assert made == expected


def test_rows_that_fit_no_layout():
    order = (POSITIVE, NEGATIVE)
    for layout in (BATCH, EACH, TILED):
        with pytest.raises(UnknownRows):
            spans(order, 4, 6, layout)
    assert spans(order, 4, 6, CHUNKS) == ((POSITIVE, 0, 3), (NEGATIVE, 3, 3))
    with pytest.raises(UnknownRows):
        spans(order, 4, 7, CHUNKS)


def test_qwen_image_21_has_a_row_that_belongs_to_both_sides():
    net = type("QwenImage21Transformer2DModel", (), {})()
    layouts = layouts_of(net)
    for name in ("time_text_embed.timestep_embedder.linear_1", "transformer_blocks.0.modulation.1"):
        assert layouts.of(f"diffusion_model.{name}") == ONE_MORE
    with pytest.raises(UnknownRows):
        spans((NEGATIVE, POSITIVE), 2, 3, ONE_MORE)
    assert spans((NEGATIVE, NEGATIVE), 2, 3, ONE_MORE) == ((NEGATIVE, 0, 3),)
    assert layouts.known and not layouts_of(object()).known


def test_only_what_is_made_of_the_time_stands_twice():
    """Twice the batch in any other layer is another thing: tokens as rows, for instance."""
    layouts = layouts_of(type("Flux", (), {})())
    for name in ("time_in.in_layer", "double_blocks.0.img_mod.lin", "single_blocks.3.modulation.lin",
                 "double_stream_modulation_img.lin", "final_layer.adaLN_modulation.1"):  # fmt: skip
        assert layouts.of(f"diffusion_model.{name}") == TWICE, name
    for name in ("double_blocks.0.img_mlp.0", "single_blocks.0.linear1", "img_in", "final_layer.linear"):
        assert layouts.of(f"diffusion_model.{name}") == BATCH, name


# --- found out by running


def probed(net, x, order):
    call, seen = ModelCall(), {}
    layers = LayersWithTerms(lambda name: net.get_submodule(name), {"layer": terms_for(net.layer)}, call)
    layers.put_in()
    for branch in (None, POSITIVE, NEGATIVE):
        call.seen = seen[branch] = Seen()
        net(changed(x, order, len(x), branch))
    layers.take_out()
    return seen


@pytest.mark.parametrize("order", ((NEGATIVE, POSITIVE), (POSITIVE, NEGATIVE, POSITIVE)))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layout_is_found(shape, order):
    through, layout = SHAPES[shape]
    net, x = Net(through), normal(2 * len(order), 3, WIDTH)
    before = x.clone()
    seen = probed(net, x, order)
    assert found(seen, order, len(x)) == {"layer": layout}
    assert torch.equal(x, before)
    layouts = layouts_found(seen, order, len(x))
    torch.testing.assert_close(run(net, x, order, layouts), truth(net, x, order))


UNKNOWN = {
    "mixed": lambda x, layer: layer(x + x.mean(0, keepdim=True)),
    "shared": lambda x, layer: x + layer(torch.ones_like(x)),
    "swapped": lambda x, layer: layer(x.roll(len(x) // 2, 0)).roll(len(x) // 2, 0),
    "one more": lambda x, layer: layer(torch.cat([x, x[:1] * 0]))[: len(x)],
    "another number of rows each time": lambda x, layer: layer(x[x[:, 0, 0] > x[:, 0, 0].median()]).mean(0) + x,
    "two arrangements": lambda x, layer: layer(x) + layer(x.roll(1, 0)),
}


@pytest.mark.parametrize("shape", UNKNOWN)
def test_what_is_not_certain_stays_unknown(shape):
    net, x, order = Net(UNKNOWN[shape]), normal(4, 3, WIDTH), (NEGATIVE, POSITIVE)
    seen = probed(net, x, order)
    assert found(seen, order, 4) == {"layer": None}
    with pytest.raises(UnknownRows, match="in layer"):
        layouts_found(seen, order, 4)


def test_only_floating_rows_of_the_batch_are_changed():
    order = (NEGATIVE, POSITIVE)
    ids, other, half = torch.arange(4), normal(3, 2), torch.ones(4, 2, dtype=torch.bfloat16)
    made = changed([ids, other, half, "word", 3.0], order, 4, POSITIVE)
    assert torch.equal(made[0], ids) and torch.equal(made[1], other) and made[3:] == ["word", 3.0]
    assert torch.equal(made[2][:2], half[:2]) and not (made[2][2:] == half[2:]).any()


def test_a_batch_that_may_stand_twice_stands_so_and_no_other_way():
    """Reference pictures in the time embedding double the rows; twelve times as many are another node's doing, and say
    nothing of whose they are."""
    assert spans((0, 1), 2, 4, TWICE) == ((0, 0, 1), (1, 1, 1), (0, 2, 1), (1, 3, 1))
    assert spans((0, 1), 2, 2, TWICE) == ((0, 0, 1), (1, 1, 1))
    for rows in (1, 3, 6, 24):
        with pytest.raises(UnknownRows):
            spans((0, 1), 2, rows, TWICE)
