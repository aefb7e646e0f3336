"""Parts of a ZipRank merge that are told apart quicker alone than by a merge: its settings, and the progress of a
training run."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def part(pack):
    """A module of the pack as the host has loaded it."""
    return lambda name: sys.modules[f"{pack.__name__}.nodes.host.merge.{name}"]


def test_settings_have_the_defaults_of_the_node(part, host):
    inputs = host.nodes["StyleLoomZipRankMerge"].INPUT_TYPES()
    shown = {name: entry[1] for kind in ("required", "optional") for name, entry in inputs.get(kind, {}).items()
             if len(entry) > 1}  # fmt: skip
    settings = part("settings").MergeSettings
    for field in dataclasses.fields(settings):
        assert getattr(settings(), field.name) == shown[field.name].get("default"), field.name
    given = settings.of({"seed": 7, "content_strength": 0.5})
    assert (given.seed, given.strengths) == (7, (0.5, 1.0)) and settings.of(given) is given


def test_the_curve_of_a_training_run(part, host):
    """Steps move the bar, of which the host leaves some out; every fifth and the last one draw the losses."""
    seen = []
    host.comfy.utils.set_progress_bar_global_hook(lambda done, total, preview, **more: seen.append((done, total, preview)))
    try:
        curve = part("model_modes").Curve(7)
        losses = []
        for step in range(7):
            losses.append(1.0 / (step + 1))
            curve(losses)
    finally:
        host.comfy.utils.set_progress_bar_global_hook(None)
    assert [done for done, _, _ in seen][:1] == [1] and all(total == 7 for _, total, _ in seen)
    drawn = {done: preview for done, _, preview in seen if preview is not None}
    assert list(drawn) == [5, 7]
    kind, picture, size = drawn[5]
    assert kind == "JPEG" and picture.size == (480, 240) and size == 480


def test_a_prior_that_is_not_known_for_the_model_is_said(run_node):
    def lora(seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)}
        return {f"diffusion_model.layers.{layer}.attention.qkv.{end}": torch.randn(shape, generator=generator)
                for layer in range(2) for end, shape in shapes.items()}  # fmt: skip

    said = {prior: run_node("StyleLoomZipRankMerge", content_lora=lora(1), style_lora=lora(2), prior=prior)[1].splitlines()
            for prior in ("soft", "none")}  # fmt: skip
    assert sum("prior soft: known for SDXL only" in line for line in said["soft"]) == 1
    assert not any("known for SDXL only" in line for line in said["none"]) and all(said["soft"]) and all(said["none"])
