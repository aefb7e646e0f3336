"""The picture of a merge: where each cell, mark and curve stands, read back from its pixels."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import ImageFont

DARK, LIGHT, NONE, PAPER = (36, 18, 66), (252, 226, 150), (228, 228, 226), (250, 250, 248)
BLOCKS = ("input_blocks.4.1.transformer_blocks.0", "input_blocks.4.1.transformer_blocks.1", "middle_block.1")


@pytest.fixture(scope="module")
def heat_map(pack):
    return sys.modules[f"{pack.__name__}.nodes.host.merge.heat_map"]


@pytest.mark.parametrize(("target", "due"), [
    ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", (BLOCKS[0], "attn1.to_q")),
    ("name:layers.3.attention.qkv", ("layers.3", "attention.qkv")),
    (("diffusion_model.layers.3.attention.qkv.weight", (0, 640, 320)), ("layers.3", "attention.qkv 640+")),
    ("diffusion_model.proj.weight", ("", "proj")),
])  # fmt: skip
def test_the_place_of_a_target(heat_map, target, due):
    assert heat_map.place(target) == due


def test_colours_grow_from_dark_to_light(heat_map):
    assert heat_map.colour(0) == heat_map.colour(-3) == DARK and heat_map.colour(1) == heat_map.colour(7) == LIGHT
    assert heat_map.colour(0.2) == (84, 32, 120)
    assert heat_map.colour(0.1) == (60, 25, 93), "half way from the first to the second"
    brightness = [sum(heat_map.colour(step / 20)) for step in range(21)]
    assert brightness == sorted(brightness) and len(set(brightness)) == 21


def pixels(image: torch.Tensor):
    """(x, y) -> RGB of 0 to 255."""
    values = (image[0] * 255).round().int()
    assert image.shape[0] == 1 and image.shape[3] == 3
    return lambda x, y: tuple(values[y, x].tolist())


def ink(at, xs, ys) -> int:
    return sum(at(x, y) != PAPER for y in ys for x in xs)


def kept(values) -> dict:
    """Two layers of three blocks; `values` by (block, layer)."""
    return {f"diffusion_model.{BLOCKS[block]}.{layer}.weight": both for (block, layer), both in values.items()}


VALUES = {(0, "a"): (1.0, 0.0), (1, "a"): (0.0, 1.0), (2, "a"): (0.2, None), (0, "b"): (None, 1.0), (1, "b"): (1.0, 1.0)}
WIDE, HIGH = 26, 22  # of a cell, where there are few


def test_cells_marks_and_scale(heat_map):
    at = pixels(heat_map.draw(["one", "two"], kept(VALUES), "head"))
    # Names of the rows stand left of the cells, in 12 points, after a margin of 24 and before one of 8.
    left = 24 + int(ImageFont.load_default(size=12).getlength("a")) + 8
    panel = 2 * HIGH + 44
    due = {None: NONE, 0.0: DARK, 1.0: LIGHT, 0.2: (84, 32, 120)}
    for number in range(2):
        for j, layer in enumerate("ab"):
            for i in range(3):
                value = VALUES.get((i, layer), (None, None))[number]
                x, y = left + i * WIDE, 92 + number * panel + j * HIGH
                assert at(x, y) == at(x + WIDE - 2, y + HIGH - 2) == due[value]
                assert at(x + WIDE - 1, y) == at(x, y + HIGH - 1) == PAPER, "a line of paper between the cells"
            assert ink(at, range(left - 20, left), range(y, y + HIGH)), "the name of the row"
    # Both blocks of one part share a mark; the next part has its own, a line lower where the name would not fit.
    marks = 60 + 2 * panel - 6
    assert at(left, marks + 5) != PAPER and at(left + WIDE, marks + 3) == PAPER and at(left + 2 * WIDE, marks + 5) != PAPER
    assert at(left, marks + 12) == PAPER and at(left + 2 * WIDE, marks + 20) != PAPER == at(left + 2 * WIDE, marks + 24)
    # The scale stands right of the cells, light on top, with words beside both ends.
    bar, top, tall = left + 3 * WIDE + 24, 92, panel - 44
    assert at(bar, top) == at(bar + 14, top) == LIGHT and at(bar, top + tall - 1) == DARK and at(bar - 1, top) == PAPER
    for y in (top, top + tall - 14):
        assert ink(at, range(bar + 20, bar + 70), range(y, y + 14)) > 20 and not ink(at, range(bar - 20, bar), range(y, y + 14))


def test_a_curve_stands_below_only_where_there_are_losses(heat_map):
    values = kept(VALUES)
    plain, one, curve = (heat_map.draw(["one"], values, "head", losses) for losses in ((), [3.0], [3.0, 1.0, 2.0]))
    assert plain.shape == one.shape and torch.equal(plain, one)
    assert curve.shape[1] == plain.shape[1] + 150 and torch.equal(curve[:, : plain.shape[1] - 60], plain[:, :-60])


def test_the_curve_goes_through_the_losses(heat_map):
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (200, 120), PAPER)
    heat_map.loss_curve(ImageDraw.Draw(picture), ImageFont.load_default(size=12), [3.0, 1.0, 2.0], (10, 10, 190, 110))
    at = pixels(heat_map.to_image(picture))
    blue = (40, 90, 160)
    for x, loss in ((11, 3.0), (100, 1.0), (189, 2.0)):
        y = 107 - 94 * (loss - 1.0) / 2.0
        assert any(at(x, int(y) + off) == blue for off in (-1, 0, 1, 2)), (x, loss)
    assert ink(at, range(100, 185), range(14, 26)) > 20, "the text, right above"
    flat = Image.new("RGB", (200, 120), PAPER)
    heat_map.loss_curve(ImageDraw.Draw(flat), ImageFont.load_default(size=12), [2.0, 2.0], (10, 10, 190, 110))
