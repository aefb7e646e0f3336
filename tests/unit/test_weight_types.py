"""The presets of IPAdapter Plus and the precise ones, place by place, against that pack's rules written out here."""

from __future__ import annotations

import math

import pytest

from styleloom.weights.unet import weight_types
from styleloom.weights.unet.architecture import SD15, SDXL
from styleloom.weights.unet.presets import OTHER, choose

W, WC, BOOST = 0.8, 0.3, 1.7


def rule(name, xl, t):
    """(weight, turned round) at place t, from the published rules; None: the place is left out."""
    length, kind = (11, 16)[not xl], None
    inputs, middle = (4, 4) if xl else (6, 6)
    kind = "input" if t < inputs else "middle" if t == middle else "output"
    f = {"linear": None, "ease in": 1 - t / length, "ease out": t / length,
         "ease in-out": 1 - abs(t - length / 2) / (length / 2), "reverse in-out": abs(t - length / 2) / (length / 2)}
    if name in f:
        return (W if f[name] is None else W * (0.05 + 0.95 * f[name])), False
    weak = {"weak input": ["input"], "weak output": ["output"], "weak middle": ["middle"],
            "strong middle": ["input", "output"]}
    if name in weak:
        return W * (0.2 if kind in weak[name] else 1), False
    if xl:
        table = {
            "style": {6: (W, False)}, "layout": {3: (W, False)}, "style + layout": {3: (WC, False), 6: (W, False)},
            "strong style transfer": {i: (W, False) for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)},
            "strong style and composition": {i: (WC if i == 3 else W, False) for i in range(11)},
            "style transfer precise": {3: (BOOST, True), 6: (W, False)},
            "composition precise": {**{i: (0.1 * BOOST, True) for i in range(11)}, 3: (W, False), 6: (BOOST, True)},
        }[name]
    else:
        style = {i: (W, False) for i in (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15)}
        table = {
            "style": style, "layout": {4: (W * 0.25, False), 5: (W, False)},
            "style + layout": {**style, 4: (WC * 0.25, False), 5: (WC, False)},
            "strong style transfer": {i: (W, False) for i in range(16) if i not in (4, 5)},
            "strong style and composition": {i: (WC if i in (4, 5) else W, False) for i in range(16)},
            "style transfer precise": {**style, 4: (BOOST * 0.25, True), 5: (BOOST, True)},
            "composition precise": {**{i: (BOOST, True) for i in style}, **{i: (BOOST * 0.1, True) for i in (6, 7, 8)},
                                    4: (W * 0.25, False), 5: (W, False)},
        }[name]  # fmt: skip
    return table.get(t)


@pytest.mark.parametrize("architecture", [SDXL, SD15], ids=["sdxl", "sd1.5"])
@pytest.mark.parametrize("name", ["style", "layout", "style + layout", *weight_types.TYPES])
def test_every_place_of_every_type(architecture, name):
    chosen = choose(architecture, OTHER + name, W, WC, False, boost=BOOST)
    for t, (block, depth, _) in enumerate(architecture.blocks):
        due = rule(name, architecture is SDXL, t)
        for i in range(depth):
            made = chosen.get((*block, i))
            if due is None or due[0] == 0:
                assert made is None
            else:
                assert math.isclose(made[0], due[0], rel_tol=1e-12)
                assert made[1] == ("away from style" if due[1] else "style")


def test_two_pictures():
    both = choose(SDXL, OTHER + "strong style and composition", W, WC, True)
    assert both["input", 8, 0] == (WC, "layout") and both["middle", 0, 0] == (W, "style")
    one = choose(SDXL, "precise style", W, WC, True, boost=BOOST)
    assert one["input", 8, 3] == (BOOST, "away from style") and one["output", 1, 0] == (W, "style") and len(one) == 20
    two = choose(SDXL, "precise layout", W, WC, True, boost=BOOST)
    assert two["input", 8, 3] == (W, "layout") and two["output", 1, 0] == (BOOST, "away from layout") and len(two) == 20
    assert choose(SD15, "precise style", W, WC, False, boost=0.0) == choose(SD15, "style", W, WC, False)


def test_block_weights_in_the_precise_types():
    """Mad Scientist: the text takes the place of the table, the sides stay turned round where they were."""
    text = "0:0, 3:0.8, 6:0.35, 9: 2"
    made = choose(SDXL, OTHER + "composition precise", 0.5, 1, False, text, BOOST)
    assert {layer[:2]: entry for layer, entry in made.items()} == {
        ("input", 8): (0.4, "style"), ("output", 1): (0.175, "away from style"), ("output", 4): (1.0, "away from style")}
    made = choose(SDXL, OTHER + "style transfer precise", 0.5, 1, False, text, BOOST)
    assert {layer[:2]: entry for layer, entry in made.items()} == {
        ("input", 8): (0.4, "away from style"), ("output", 1): (0.175, "style"), ("output", 4): (1.0, "style")}
