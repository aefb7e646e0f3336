"""What each kind of adapter adds to the rows of a batch, against the changed weight in float64: linear layers, a part
of one, and convolutions."""

from __future__ import annotations

import pytest
import torch

from styleloom.weights.lora.kinds import KINDS, NoTerm, Place, kinds_of
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.row_adapters.layers import layer_of
from styleloom.weights.row_adapters.low_rank import LowRankTerm

D = torch.float64
OUT, IN, RANK, ALPHA, STRENGTH = 8, 6, 2, 5.0, 0.7


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def adapters(conv):
    """name → (parts, W → the change of W at strength 1), from the formulas of their papers."""
    kernel = (3, 3) if conv else ()
    one = (1, 1) if conv else ()
    down, up = normal(1, RANK, IN, *kernel), normal(2, OUT, RANK, *one)
    flat = (up.flatten(1) @ down.flatten(1)) * ALPHA / RANK
    a, b, c, d = normal(3, OUT, RANK), normal(4, RANK, IN * 3 ** len(kernel)), normal(5, OUT, RANK), normal(6, RANK, 1)
    d = d * b.flip(1)
    w1, w2 = normal(7, 4, 3), normal(8, 2, 2, *kernel)
    made = {
        "LoRA": ({"down": down, "up": up, "alpha": torch.tensor(ALPHA)}, lambda w: flat),
        "LoHa": (
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(ALPHA)},
            lambda w: ALPHA / RANK * torch.einsum("or,ri->oi", a, b) * torch.einsum("or,ri->oi", c, d),
        ),
        "LoKr": (
            {"lokr_w1": w1, "lokr_w2": w2},
            lambda w: torch.einsum("ab,cd...->acbd...", w1, w2).reshape(OUT, -1),
        ),
        "diff": ({"diff": normal(9, OUT, IN, *kernel)}, lambda w: normal(9, OUT, IN, *kernel).flatten(1)),
    }
    if conv:
        core, thin = normal(10, RANK, RANK, *kernel), normal(11, RANK, IN, 1, 1)
        tucker = torch.einsum("or,rs...,si->oi...", up.flatten(1), core, thin.flatten(1)) * ALPHA / RANK
        parts = {"down": thin, "mid": core, "up": up, "alpha": torch.tensor(ALPHA)}
        made["Tucker"] = parts, lambda w: tucker.flatten(1)
    else:
        a1, a2, b1, b2 = normal(12, IN, RANK), normal(13, RANK, IN), normal(14, OUT, RANK), normal(15, RANK, IN)
        parts = {"a1": a1, "a2": a2, "b1": b1, "b2": b2, "alpha": torch.tensor(ALPHA)}
        made["GLoRA"] = parts, lambda w: ALPHA / RANK * (w @ a1 @ a2 + b1 @ b2)
    return made


def layer(conv):
    made = torch.nn.Conv2d(IN, OUT, 3, stride=2, padding=1, dtype=D) if conv else torch.nn.Linear(IN, OUT, dtype=D)
    with torch.no_grad():
        made.weight.copy_(normal(20, *made.weight.shape))
        made.bias.copy_(normal(21, OUT))
    return made.requires_grad_(False)


def run(kind, parts, place, x, y, base):
    term = kind.row_form(parts, place)
    if isinstance(term, LowRank):
        term = LowRankTerm(place.layer, [(term, place.source)])
    y = y.clone()
    strengths = (0.0, STRENGTH)
    seen = term.enter(x, strengths)
    y = base(seen) if seen is not x else y
    term.leave(x, y, strengths, base)
    return y


CASES = [(conv, name) for conv in (False, True) for name in adapters(conv)]


@pytest.mark.parametrize(("conv", "name"), CASES)
def test_rows_get_the_change(conv, name):
    parts, change = adapters(conv)[name]
    ((kind, own),) = kinds_of(parts, "layer")
    module = layer(conv)
    x = normal(30, 3, IN, 7, 7) if conv else normal(30, 3, 5, IN)
    made = run(kind, own, Place("layer.weight", "weight", layer_of(module), 1), x, module(x), module)
    changed = layer(conv)
    changed.weight += STRENGTH * change(module.weight.flatten(1)).reshape(module.weight.shape)
    torch.testing.assert_close(made, changed(x), rtol=1e-9, atol=1e-9)
    assert (made - module(x)).norm() > 0.01


@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("name", ("LoRA", "LoHa", "LoKr", "diff"))
def test_a_part_of_a_linear_layer(name, axis):
    """Rows 3 to 10, or inputs 2 to 7, of a layer that is larger than the adapter; its rows swapped, where they are."""
    parts, change = adapters(False)[name]
    ((kind, own),) = kinds_of(parts, "layer")
    module = torch.nn.Linear(IN if axis == 0 else 9, 12 if axis == 0 else OUT, dtype=D).requires_grad_(False)
    part = (axis, 3, OUT) if axis == 0 else (axis, 2, IN)
    swap = (lambda rows: rows.flip(0)) if axis == 0 and name != "LoKr" else None
    x = normal(31, 4, module.in_features)
    made = run(kind, own, Place("l.weight", "weight", layer_of(module), 1, part, swap), x, module(x), module)
    delta = change(None) if swap is None else change(None).flip(0)
    weight = module.weight.clone()
    weight.narrow(*part).add_(STRENGTH * delta)
    torch.testing.assert_close(made, torch.nn.functional.linear(x, weight, module.bias), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ("OFT", "BOFT"))
def test_a_rotation_of_the_outputs(name):
    """The change is on the outputs alone, keeps the bias out, and is nothing at strength 0; the rotation itself is held
    against the host's merge in tests/host."""
    kind = next(kind for kind in KINDS if kind.name == name)
    blocks = normal(40, 1, 2, 4, 4) if name == "BOFT" else normal(40, 2, 4, 4)
    own = {"oft_blocks": (blocks - blocks.transpose(-1, -2)).float() * 0.1}
    module = layer(False)
    x = normal(32, 3, IN)
    place = Place("l.weight", "weight", layer_of(module), 1)
    turn = kind.turn(own, STRENGTH).double()
    changed = module.weight + turn @ module.weight
    made = run(kind, own, place, x, module(x), module)
    torch.testing.assert_close(made, torch.nn.functional.linear(x, changed, module.bias), rtol=1e-6, atol=1e-6)
    assert turn.abs().max() > 0.01


@pytest.mark.parametrize(("name", "parameter"), [("LoRA", "bias"), ("LoHa", "bias"), ("LoKr", "bias"), ("GLoRA", "bias")])
def test_adapters_of_matrices_do_not_go_on_a_bias(name, parameter):
    parts, _ = adapters(False)[name]
    ((kind, own),) = kinds_of(parts, "layer")
    with pytest.raises(NoTerm, match=f"{name} adapter on a linear layer's bias"):
        kind.row_form(own, Place("l.bias", parameter, layer_of(layer(False)), 1))


def test_what_has_no_row_form_on_a_part():
    """A part of a convolution cannot be cut out of its input; GLoRA and rotations need the whole weight."""
    part = (0, 0, OUT)
    for conv, name in ((True, "LoRA"), (True, "LoHa"), (False, "GLoRA")):
        parts, _ = adapters(conv)[name]
        ((kind, own),) = kinds_of(parts, "layer")
        with pytest.raises(NoTerm, match="a part of a"):
            kind.row_form(own, Place("l.weight", "weight", layer_of(layer(conv)), 1, part))
