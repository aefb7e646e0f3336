"""Which side of guidance a chunk of a batch is on, by the ids of the conditionings."""

from __future__ import annotations

import sys
import uuid

import pytest


@pytest.fixture
def sides(pack):
    return sys.modules[f"{pack.__name__}.nodes.host.batch_sides"]


def cond():
    return {"uuid": uuid.uuid4()}


def options(places, conds=()):
    return {"cond_or_uncond": places} | ({"uuids": [c["uuid"] for c in conds]} if conds else {})


def test_the_id_decides_and_the_place_only_where_it_is_not_known(sides):
    positive, middle, negative, strange = cond(), cond(), cond(), cond()
    run = sides.BatchSides()
    run.given({"positive": [positive], "middle": [middle], "negative": [negative]})
    batch = [negative, positive, middle, strange, strange]
    assert run.of_chunks(options([0, 1, 1, 0, 1], batch)) == (
        sides.NEGATIVE, sides.POSITIVE, sides.POSITIVE, sides.POSITIVE, sides.NEGATIVE
    )  # fmt: skip
    run.forget()
    assert run.of_chunks(options([1, 0])) == (sides.NEGATIVE, sides.POSITIVE)
    assert run.of_chunks({}) == (sides.POSITIVE,)


def test_a_copy_on_the_other_side_is_told_to_everyone_who_asks(sides):
    """Guidance and the style injector may both look at one run; the second must see the copy as one, too."""
    positive, negative = cond(), cond()
    runs = [sides.BatchSides(), sides.BatchSides()]
    for run in runs:
        run.given({"positive": [positive], "negative": [negative]})
    copy = dict(positive)
    conds = {"positive": [positive], "negative": [negative, copy]}
    for run in runs:
        assert run.prepared(conds) == [(copy, sides.NEGATIVE)]
    assert copy["uuid"] != positive["uuid"]
    for run in runs:
        assert run.of_chunks(options([0, 0, 0], [negative, copy, positive])) == (
            sides.NEGATIVE, sides.NEGATIVE, sides.POSITIVE
        )  # fmt: skip
