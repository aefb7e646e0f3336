"""LoRAs in a region, with no host: terms against float64, and the masks that they are multiplied with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.places import PICTURE, Given, Grid, NoPlaces, grid_of
from styleloom.weights.row_adapters.forward import LayersWithTerms, ModelCall
from styleloom.weights.row_adapters.layers import layer_of
from styleloom.weights.row_adapters.low_rank import SharedInput
from styleloom.weights.row_adapters.regional import RegionalLowRank, in_region
from styleloom.weights.row_adapters.regions import Here, Maps, Placed, Places, Region, Scene, View, to_grid
from styleloom.weights.row_adapters.rows import NEGATIVE, POSITIVE
from styleloom.weights.row_adapters.terms import (
    BiasDifference,
    ConvLowRank,
    Difference,
    InputAndOutput,
    Kronecker,
    OutputTransform,
)
from styleloom.weights.token_tables import tokens_of
from styleloom.weights.unet.tokens import UNetTokens

D = torch.float64
STRENGTH = 0.7


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape)), dtype=D)


# --- terms


def linear():
    return torch.nn.Linear(12, 8).to(D).requires_grad_(False)


def conv():
    return torch.nn.Conv2d(6, 8, 3, stride=2, padding=1).to(D).requires_grad_(False)


def rotation(module):
    skew = normal(8, 8, seed=4) * 0.1
    return OutputTransform(
        layer_of(module), 0, lambda held, strength, like: strength * held[0].to(like), None, (skew - skew.T,)
    )


TERMS = {
    "difference": (linear, lambda m: Difference(layer_of(m), 0, normal(8, 12))),
    "difference of a part": (linear, lambda m: Difference(replace(layer_of(m), shape=(3, 12)), 0, normal(3, 12),
                                                          (2, 3))),
    "bias": (linear, lambda m: BiasDifference(layer_of(m), 0, normal(8))),
    "LoKr": (linear, lambda m: Kronecker(layer_of(m), 0, (normal(2, 3),), (normal(4, 4),), 0.5)),
    "OFT": (linear, rotation),
    "GLoRA": (linear, lambda m: InputAndOutput(layer_of(m), 0, normal(2, 12), normal(12, 2), normal(2, 12, seed=1),
                                               normal(8, 2), 0.3)),
    "LoCon": (conv, lambda m: ConvLowRank(layer_of(m), 0, normal(2, 54), normal(8, 2), None, 0.5)),
    "Tucker": (conv, lambda m: ConvLowRank(layer_of(m), 0, normal(2, 6), normal(8, 2), normal(2, 2, 3, 3), 0.5)),
    "difference of a convolution": (conv, lambda m: Difference(layer_of(m), 0, normal(8, 6, 3, 3))),
    "OFT of a convolution": (conv, rotation),
    "bias of a convolution": (conv, lambda m: BiasDifference(layer_of(m), 0, normal(8))),
}  # fmt: skip


def through(module, term, x, strengths):
    y = module(term.enter(x, strengths)).clone()
    term.leave(x, y, strengths, module)
    return y


@pytest.mark.parametrize("rows", (1, 2))
@pytest.mark.parametrize("kind", TERMS)
def test_every_kind_adds_its_change_times_the_mask(kind, rows):
    make, term = TERMS[kind]
    module = make()
    x = normal(2, 5, 12) if make is linear else normal(2, 6, 4, 6)
    plain, whole = module(x), through(module, term(module), x, (STRENGTH,))
    where = torch.rand(rows, *((5, 1) if make is linear else (1, 2, 3)), dtype=D)
    found = through(module, in_region(term(module)), x, (Placed(STRENGTH, where),))
    torch.testing.assert_close(found, plain + where * (whole - plain))
    torch.testing.assert_close(through(module, in_region(term(module)), x, (STRENGTH,)), whole)
    assert torch.equal(through(module, in_region(term(module)), x, (0.0,)), plain)


def test_kinds_without_a_region():
    norm = torch.nn.LayerNorm(8)
    assert in_region(Difference(layer_of(norm), 0, normal(8))) is None
    module = conv()
    glora = InputAndOutput(layer_of(module), 0, normal(2, 6), normal(6, 2), normal(2, 54), normal(8, 2), 1.0)
    assert in_region(glora) is None


def changes():
    """Three changes of a fused layer: two of all outputs, one of a part of them."""
    return [
        (LowRank(normal(2, 12, seed=1), normal(8, 2, seed=1), (), 0.5), 0),
        (LowRank(normal(3, 12, seed=2), normal(3, 3, seed=2), (), 2.0, (4, 3)), 1),
        (LowRank(normal(1, 12, seed=3), normal(8, 1, seed=3)), 2),
    ]


def expected(x, y, strengths):
    for pair, source in changes():
        start, count = pair.outputs or (0, 8)
        made = (x @ pair.down.T @ pair.up.T) * pair.scale
        own = strengths[source]
        y[..., start : start + count] += made * (own.where * own.strength if isinstance(own, Placed) else own)
    return y


def here(*strengths):
    made = Here(strengths)
    made.kept = {}
    return made


@pytest.mark.parametrize("shape", ((2, 5), (2, 2, 3), (2,)))
@pytest.mark.parametrize("contiguous", (True, False))
def test_low_rank_changes_with_masks_and_without_in_one_product(shape, contiguous):
    module, x = linear(), normal(*shape, 12)
    where = [torch.rand(rows, *shape[1:], 1, dtype=D) for rows in (1, 2)]
    strengths = here(Placed(0.7, where[0]), 0.4, Placed(-0.3, where[1]))
    y = module(x)
    if not contiguous:
        y = y.transpose(0, -1).contiguous().transpose(0, -1)
    due = expected(x, y.clone(), strengths)
    term = RegionalLowRank(layer_of(module), changes())
    assert len(term.rows) == 2, "changes of the same outputs are one product"
    term.leave(x, y, strengths, module)
    torch.testing.assert_close(y, due)
    term.leave(x, y, here(0.0, 0.0, 0.0), module)
    torch.testing.assert_close(y, due)


def test_low_rank_changes_that_share_their_input():
    module, x = linear(), normal(2, 5, 12)
    strengths = here(Placed(0.7, torch.rand(1, 5, 1, dtype=D)), 0.4, 0.0)
    terms = [RegionalLowRank(layer_of(module), changes()) for _ in range(3)]
    shared = SharedInput(terms)
    for _ in range(2):
        for term in terms:
            y = module(x)
            due = expected(x, y.clone(), strengths)
            term.add(x, x, y, strengths)
            torch.testing.assert_close(y, due)
    shared.undo()


# --- places


def places(region, scene, axis=-1, branch=POSITIVE):
    return Places(UNetTokens(), {"layer": (PICTURE, axis)}, {branch: [region, None]}, scene, Maps())


def scene(*size, rows=1, views=None, pictures=None, per_frame=1, whole=None):
    latent = grid_of(size)
    views = views or tuple(View(number) for number in range(rows))
    return Scene(Given(latent), views, whole or latent, pictures or rows, per_frame)


def shares(region, seen, out, axis=-1):
    found = places(region, seen, axis).strengths("layer", POSITIVE, 0, out.shape[0], out, (2.0, 0.5))
    assert found[1] == 0.5 and found[0].strength == 2.0
    return found[0].where


@given(height=st.integers(1, 4), width=st.integers(1, 4), level=st.integers(0, 2), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_token_has_the_mean_of_the_mask_over_its_place(height, width, level, seed):
    size = (4 * height, 4 * width)
    mask = torch.rand(1, 2 * size[0], 2 * size[1], generator=torch.Generator().manual_seed(seed))
    step = 2 * 2**level
    rows, columns = size[0] >> level, size[1] >> level
    due = mask[0].double().reshape(rows, step, columns, step).mean((1, 3))
    found = shares(Region("it", (mask,)), scene(*size), torch.zeros(1, rows * columns, 3))
    torch.testing.assert_close(found[0, :, 0].double(), due.flatten(), atol=1e-6, rtol=1e-6)
    as_map = shares(Region("it", (mask,)), scene(*size), torch.zeros(1, 3, rows, columns), axis=1)
    torch.testing.assert_close(as_map[0, 0].double(), due, atol=1e-6, rtol=1e-6)


def test_masks_multiply():
    first, second = torch.rand(1, 8, 8), torch.rand(1, 8, 8)
    found = shares(Region("it", (first, second)), scene(8, 8), torch.zeros(1, 64, 3))
    torch.testing.assert_close(found.flatten(), (first * second).flatten())


def test_one_mask_for_each_picture_or_for_all():
    masks = torch.rand(3, 4, 4)
    seen = scene(4, 4, rows=3)
    assert torch.equal(shares(Region("it", (masks,)), seen, torch.zeros(3, 16, 2)).flatten(1), masks.flatten(1))
    assert shares(Region("it", (masks[:1],)), seen, torch.zeros(3, 16, 2)).shape == (1, 16, 1)
    window = scene(4, 4, views=(View(2), View(0)), pictures=3)
    found = shares(Region("it", (masks,)), window, torch.zeros(2, 16, 2))
    assert torch.equal(found.flatten(1), masks[[2, 0]].flatten(1))
    for wrong in (masks[:2], torch.rand(4, 4, 4)):
        with pytest.raises(StyleLoomError, match="(?s)has . pictures.*3, one for each"):
            shares(Region("it", (wrong,)), seen, torch.zeros(3, 16, 2))


def test_the_rows_of_one_side():
    masks = torch.rand(2, 4, 4)
    seen = scene(4, 4, views=(View(0), View(1), View(0), View(1)), pictures=2)
    found = places(Region("it", (masks,)), seen).strengths("layer", POSITIVE, 1, 2, torch.zeros(4, 16, 2), (1.0, 0.0))
    assert torch.equal(found[0].where.flatten(1), masks[[1, 0]].flatten(1))


def test_an_area_sees_its_part_of_the_mask():
    mask = torch.rand(1, 8, 12)
    area = (1, 4, 6, 0, 2, 5)
    seen = scene(4, 6, views=(View(0, None, area), View(0, None, (1, 4, 6, 0, 4, 0))), whole=Grid(1, 8, 12), pictures=1)
    found = shares(Region("it", (mask,)), seen, torch.zeros(2, 24, 2))
    assert torch.equal(found[0].reshape(4, 6), mask[0, 2:6, 5:11])
    assert torch.equal(found[1].reshape(4, 6), mask[0, 4:8, :6])


def of_video(masks, frames=3, per_frame=4, chosen=None):
    shown = frames if chosen is None else len(chosen)
    seen = scene(shown, 4, 4, views=(View(0, chosen),), per_frame=per_frame, whole=Grid(frames, 4, 4))
    return Maps().of_view(Region("it", (masks,)), seen, seen.views[0])


def test_masks_of_a_video():
    """One for all frames, one for each frame of the latent, or of the finished video: the first of those alone, then
    four to a latent frame."""
    masks = torch.rand(9, 4, 4)
    assert torch.equal(of_video(masks[:1]), masks[:1].expand(3, -1, -1))
    assert torch.equal(of_video(masks[:3]), masks[:3])
    torch.testing.assert_close(of_video(masks), torch.stack([masks[0], masks[1:5].mean(0), masks[5:].mean(0)]))
    assert torch.equal(of_video(masks[:3], chosen=(2, 1)), masks[[2, 1]])
    with pytest.raises(StyleLoomError, match="(?s)3 .*or 9 "):
        of_video(masks[:4])


def test_patches_that_stand_over_the_edge():
    shown = torch.rand(1, 3, 5)
    found = to_grid(shown, Grid(1, 2, 3), Grid(1, 2, 2))
    full = torch.cat([shown, shown[:, -1:]], 1)
    full = torch.cat([full, full[..., -1:]], 2)
    torch.testing.assert_close(found, full.reshape(1, 2, 2, 3, 2).mean((2, 4)))


def test_tokens_that_fit_nothing():
    region = Region("positive LoRA", (torch.rand(1, 8, 8),))
    with pytest.raises(StyleLoomError, match="positive LoRA.*layer.*20 tokens for a latent of 8 x 8"):
        shares(region, scene(8, 8), torch.zeros(1, 20, 2))
    with pytest.raises(StyleLoomError, match="2 rows for a batch of 1"):
        shares(region, scene(8, 8), torch.zeros(2, 64, 2))


def test_unknown_models_and_layers():
    with pytest.raises(NoPlaces, match="Linear"):
        tokens_of(linear())
    with pytest.raises(NoPlaces, match="time_stack"):
        UNetTokens().stream("input_blocks.1.1.time_stack.0.attn1.to_q")


# --- in a layer


def test_each_side_has_its_own_region_and_strengths_that_change():
    module, x = linear(), normal(4, 16, 12)
    masks = torch.rand(1, 4, 4), torch.rand(1, 4, 4)
    pairs = {POSITIVE: changes()[0][0], NEGATIVE: changes()[2][0]}
    regions = {side: [Region("it", (mask,))] for side, mask in zip((POSITIVE, NEGATIVE), masks)}
    terms = {side: [RegionalLowRank(layer_of(module), [(pair, 0)])] for side, pair in pairs.items()}
    root, call = torch.nn.ModuleDict({"layer": module}), ModelCall()
    call.places = Places(UNetTokens(), {"layer": (PICTURE, -1)}, regions, scene(4, 4, rows=4), Maps())
    layers = LayersWithTerms(root.get_submodule, {"layer": terms}, call)
    plain = module(x)
    layers.put_in()
    call.active = True
    for strengths in ((0.7, 0.2), (0.0, -1.0), (0.7, 0.2)):
        call.set_rows((NEGATIVE, POSITIVE), 4, {POSITIVE: strengths[:1], NEGATIVE: strengths[1:]},
                      (POSITIVE, NEGATIVE))  # fmt: skip
        due = plain.clone()
        for rows, side, strength, mask in ((slice(2, 4), POSITIVE, strengths[0], masks[0]),
                                           (slice(0, 2), NEGATIVE, strengths[1], masks[1])):  # fmt: skip
            pair = pairs[side]
            added = x[rows] @ pair.down.T @ pair.up.T * pair.scale
            due[rows] += added * strength * mask.double().reshape(1, 16, 1)
        for watched in (set(), None):
            call.called = watched
            torch.testing.assert_close(module(x), due, atol=1e-6, rtol=1e-6)
    layers.take_out()
