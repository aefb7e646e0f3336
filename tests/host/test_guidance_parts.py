"""Parts of asymmetric guidance that are told apart quicker alone than by what a run makes of them."""

from __future__ import annotations

import sys
import types

import pytest
import torch


@pytest.fixture(scope="module")
def part(pack):
    """A module of the pack as the host has loaded it."""
    return lambda name: sys.modules[f"{pack.__name__}.{name}"]


def test_hooks_of_a_conditioning_that_is_copied_to_the_other_side(part, host):
    """The copy keeps the user's hooks, and has those of its own side for ours."""
    rows = part("weights.row_adapters.rows")
    hooks_on = part("nodes.host.guidance.guider").AsymmetricCFGGuider._hooks_on

    def group(*hooks):
        made = host.comfy.hooks.HookGroup()
        for hook in hooks:
            made.add(hook)
        return made

    positive, negative, user = (host.comfy.hooks.WeightHook() for _ in range(3))
    plan = types.SimpleNamespace(hooks={rows.POSITIVE: group(positive), rows.NEGATIVE: group(negative)})
    guider = types.SimpleNamespace(plan=plan)
    for given in (group(user, positive), group(user, negative), group(user)):
        assert hooks_on(guider, rows.POSITIVE, given).hooks == [user, positive]
        assert hooks_on(guider, rows.NEGATIVE, given).hooks == [user, negative]
    assert hooks_on(guider, rows.NEGATIVE, None).hooks == [negative]
    plan.hooks[rows.NEGATIVE] = None
    assert hooks_on(guider, rows.NEGATIVE, group(positive)) is None
    assert hooks_on(guider, rows.NEGATIVE, group(user)).hooks == [user]


def test_only_neighbours_are_stacked(part):
    """The order of merging stays where a change that is no LoRA stands between two that are."""
    layers, low, terms = (part(f"weights.row_adapters.{name}") for name in ("layers", "low_rank", "terms"))
    pair = part("weights.lora.low_rank").LowRank
    layer = layers.layer_of(torch.nn.Linear(6, 4))
    first, second, third = ((pair(torch.randn(2, 6), torch.randn(4, 2)), place) for place in range(3))
    between = terms.Difference(layer, 3, torch.randn(4, 6))
    made = part("nodes.host.guidance.plan")._stacked([first, second, between, third], layer, None, set())
    assert [type(term) for term in made] == [low.LowRankTerm, terms.Difference, low.LowRankTerm]
    assert made[0].sources == (0, 1) and made[1] is between and made[2].sources == (2,)


def test_an_adapter_that_the_table_does_not_know_has_no_term(part):
    """A newer host may have one: the caller then leaves it to the host's own hooks."""
    terms, layers = part("nodes.host.guidance.adapter_terms"), part("weights.row_adapters.layers")
    place = terms.Place("layer.weight", "weight", layers.layer_of(torch.nn.Linear(6, 4)), 0)
    with pytest.raises(terms.NoTerm, match="an adapter of the kind newest"):
        terms.term_of(types.SimpleNamespace(name="newest", weights=()), place)
    with pytest.raises(terms.NoTerm, match="a layer of another kind"):
        terms.term_of(types.SimpleNamespace(name="newest", weights=()), terms.Place("e.weight", "weight", None, 0))
