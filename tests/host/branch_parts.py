"""Benches and LoRAs for the tests of asymmetric guidance, imported by name."""

from __future__ import annotations

import pytest

BOUND = 1e-4  # relative, in the norm of the picture
ONE = {"steps": 1}
SIDES = {"positive_strength": 0.8, "negative_strength": 0.5}


@pytest.fixture(scope="module")
def benches(run_node, kit):
    return kit.two_passes.benches(run_node, kit)


@pytest.fixture(scope="module")
def bench(benches):
    return benches("sd1.5")


@pytest.fixture(scope="module")
def distance(kit):
    return kit.two_passes.distance


@pytest.fixture(scope="module")
def loras(benches):
    """name → the LoRAs of both sides, as inputs of our node and as what the truth merges."""
    made = {}

    def get(name="sd1.5"):
        if name not in made:
            made[name] = benches(name).lora(1), benches(name).lora(2, rank=3, alpha=None)
        style, gray = made[name]
        return {"positive_lora": style, "negative_lora": gray, **SIDES}, ([(style, 0.8)], [(gray, 0.5)])

    return get
