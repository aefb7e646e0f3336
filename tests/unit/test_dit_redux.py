"""Where the tokens of Redux stand in a text, and the masks for them, against slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from styleloom.weights.dit import redux


def test_every_whole_copy_is_found_and_no_part():
    g = torch.Generator().manual_seed(1)
    tokens, text = torch.randn(3, 4, generator=g), torch.randn(3, 11, 4, generator=g)
    text[0, 2:5] = text[0, 8:11] = tokens  # a row that the host repeated
    text[1, 5:7] = tokens[:2]  # a part
    text[1, 8], text[1, 10] = tokens[0], tokens[2]  # both ends, and another between
    text[2, 0:3] = tokens
    text[2, 4:7] = tokens * (1 + 2**-23)
    due = torch.zeros(3, 11, dtype=torch.bool)
    for row, start in ((0, 2), (0, 8), (2, 0)):
        due[row, start : start + 3] = True
    assert torch.equal(redux.find(text, tokens), due)
    assert not redux.find(text[:, :2], tokens).any() and not redux.find(text, torch.ones(3, 5)).any()


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 3.0])
def test_the_bias_is_on_these_keys_for_all_but_their_own_queries(strength):
    marks = torch.tensor([[False, True, True, False], [False] * 4])
    value, made = math.log(strength) if strength else -math.inf, redux.bias(marks, 6, strength, torch.float64)
    for row in range(2):
        for i in range(6):
            for j in range(6):
                hit = row == 0 and j in (1, 2) and i not in (1, 2)
                assert made[row, i, j] == (value if hit else 0.0)
    assert len(redux.bias(marks[[0, 0]], 6, strength, torch.float64)) == 1


def test_masks_add_up():
    more = torch.tensor([[[0.0, -1.0], [0.0, 0.0]]])
    seen = torch.tensor([[True, True], [False, True]])
    due = torch.tensor([[0.0, -1.0], [-math.inf, 0.0]])
    assert redux.with_bias(None, more) is more
    assert torch.equal(redux.with_bias(seen, more)[0], due)
    there = torch.randn(2, 3, 2, 2)
    assert torch.equal(redux.with_bias(there, more), there + more[0])
    assert torch.equal(redux.with_bias(there[:, 0], more), there[:, 0] + more[0])


def test_strengths_of_the_presets():
    for preset, single in (("style", range(10, 38)), ("layout", range(10)), ("all", range(38))):
        made = redux.strengths(preset, 0.5)
        assert len(made) == 57 and {b for b, s in made.items() if s == 0.5 and b[0] == "single"} == {
            ("single", i) for i in single}  # fmt: skip
        assert all(made["double", i] == (0.5 if preset == "all" else 0.0) for i in range(19))
