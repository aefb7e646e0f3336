"""A cheap sample of `benchmarks/asymmetric_models.py`: the row layouts of the table, in the host's own models, against
two models that share nothing. The whole list is made by that command."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

EXACT = 1e-5


@pytest.fixture(scope="module")
def bench_models(host):
    folder = str(Path(__file__).parents[2] / "benchmarks")
    before = list(sys.path)
    sys.path.insert(0, folder)
    try:
        import asymmetric_models
    finally:
        sys.path[:] = before
    return asymmetric_models


@pytest.fixture
def compare(bench_models, host):
    def compared(name, **changes):
        variants = (*bench_models.PICTURES, *bench_models.OTHERS)
        variant = next(variant for variant in variants if variant.name == name)
        with torch.inference_mode():
            return bench_models.compare(dataclasses.replace(variant, **changes), host.nodes)

    return compared


@pytest.fixture
def layouts(pack):
    return sys.modules[f"{pack.__name__}.weights.row_adapters.layouts"]


ONE_CALL = (
    "PixArt sigma",  # the prompts of all rows side by side
    "Krea 2, a reference",  # tokens as rows; the times of target and references one after the other
    "PixelDiT",  # patches as rows, fed forward in pieces
    "HunyuanImage 2.1",  # one row for everybody
    "Cosmos 1, as many frames as rows, blocks",  # the batch on the fourth axis
    "Wan 2.1 VACE, two contexts",  # the batch twice
    "Hunyuan3D 2.1, attention only",  # halves that the model swaps
)


@pytest.mark.parametrize("name", ONE_CALL)
def test_one_call_and_exact(name, compare):
    found = compare(name)
    assert found["error"] < EXACT and found["calls"] == 1
    assert found["symmetric"] > 0.05


def test_a_batch_that_the_host_mixes_runs_apart(compare):
    found = compare("HunyuanVideo I2V, guiding frame")
    assert found["error"] < EXACT and found["calls"] == 2


def test_a_class_that_nobody_listed_is_found_out(compare, layouts, monkeypatch):
    monkeypatch.setattr(layouts, "_TABLE", {})
    found = compare("Cosmos 1, as many frames as rows, blocks")
    assert found["error"] < EXACT and found["calls"] == 1


def test_a_class_that_nobody_listed_and_whose_rows_stay_unknown(compare, layouts, monkeypatch):
    monkeypatch.setattr(layouts, "_TABLE", {})
    found = compare("Hunyuan3D 2.1, attention only")
    assert found["error"] < EXACT and found["calls"] == 2


def test_layers_that_prepare_the_prompt(compare, host, monkeypatch):
    """A model that runs a layer of its own on the prompt before sampling, as Anima, LTX-2 and MiniMax-H3 do."""
    import comfy.conds
    import comfy.model_base

    inner = comfy.model_base.QwenImage.extra_conds

    def extra_conds(self, **kwargs):
        made = inner(self, **kwargs)
        made["c_crossattn"] = comfy.conds.CONDRegular(self.diffusion_model.txt_in(made["c_crossattn"].cond))
        return made

    monkeypatch.setattr(comfy.model_base.QwenImage, "extra_conds", extra_conds)
    found = compare("Qwen-Image", only="txt_in")
    assert found["error"] < EXACT and found["calls"] == 1 and found["symmetric"] > 1e-3


def test_a_patch_that_cannot_act_while_the_prompt_is_prepared_is_refused(compare, bench_models, monkeypatch):
    import comfy.model_base

    inner = comfy.model_base.QwenImage.extra_conds

    def extra_conds(self, **kwargs):
        self.diffusion_model.txt_in(kwargs["cross_attn"])
        return inner(self, **kwargs)

    def dora(model, seed, only):
        made = lora(model, seed, only)
        weight = model.diffusion_model.txt_in.weight
        return made | {"diffusion_model.txt_in.dora_scale": weight.norm(dim=1, keepdim=True)}

    lora = bench_models.lora_for
    monkeypatch.setattr(bench_models, "lora_for", dora)
    monkeypatch.setattr(comfy.model_base.QwenImage, "extra_conds", extra_conds)
    with pytest.raises(Exception, match="txt_in runs while the prompts are prepared"):
        compare("Qwen-Image", only="txt_in")
