"""The modes of ZipRank Merge that run the model: what the node gives and leaves behind, on an SD1.5 of few blocks.

What the modes compute is in test_mask_training.py.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

SMALL = {"content_prompt": "a red cube", "style_prompt": "an ink drawing", "size": 64, "calibration_steps": 1}


@pytest.fixture(scope="module")
def sd15(kit):
    with torch.inference_mode(False):
        clip = kit.architectures.ARCHITECTURES["sd1.5"].clip(0)
    return kit.architectures.make_model("sd1.5", short=True), clip


@pytest.fixture(scope="module")
def loras(kit, sd15):
    return [kit.adapters.make(sd15[0], "lora", contains="input_blocks.1.", seed=seed) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def few_pictures(pack, monkeypatch):
    modes = sys.modules[f"{pack.__name__}.nodes.host.merge.model_modes"]
    monkeypatch.setattr(modes, "LESSONS", 2)
    monkeypatch.setattr(modes, "PICTURES", 1)


@pytest.fixture
def merge(run_node, loras, sd15):
    def merging(mode, **inputs):
        given = {"content_lora": loras[0], "style_lora": loras[1], "model": sd15[0], "clip": sd15[1], **SMALL, **inputs}
        return run_node("StyleLoomZipRankMerge", mode=mode, **given)

    return merging


def state(model):
    return {key: (value.data_ptr(), value._version if not value.is_inference() else 0, float(value.float().sum()))
            for key, value in model.model.state_dict().items()}


def changed_layers(model):
    return [name for name, module in model.model.named_modules() if module._forward_hooks or "forward" in vars(module)]


@pytest.mark.parametrize("mode", ["calibrated", "train"])
def test_the_model_stays_as_it_is(mode, merge, sd15):
    before = state(sd15[0])
    flags = {name: p.requires_grad for name, p in sd15[0].model.named_parameters()}
    merge(mode, steps=1, cycle_weight=0.01)
    assert state(sd15[0]) == before and changed_layers(sd15[0]) == [] and not sd15[0].patches
    assert {name: p.requires_grad for name, p in sd15[0].model.named_parameters()} == flags
    assert not sd15[0].model.training


def change(lora, up):
    """(out, in·kernel) float64 of a layer, by the key of its `lora_up`; alpha is the rank."""
    return lora[up].flatten(1).double() @ lora[up.replace("lora_up", "lora_down")].flatten(1).double()


@pytest.mark.parametrize("mode", ["calibrated", "train"])
def test_separation_zero_and_repetition(mode, merge):
    if mode == "calibrated":  # the sum, whatever was measured
        plain, fast = merge(mode, separation=0.0)[0], merge("fast", separation=0.0)[0]
        for key in (key for key in fast if key.endswith(".lora_up.weight")):  # the change; its factors may be turned
            made, due = (change(lora, key) for lora in (plain, fast))
            assert float((made - due).norm()) < 2e-3 * float(due.norm()), key
    one, two = merge(mode, steps=2, seed=5), merge(mode, steps=2, seed=5)
    assert one[1] == two[1] and all(torch.equal(one[0][key], two[0][key]) for key in one[0])
    recipe = json.loads(one[0].metadata["styleloom.recipe"])
    assert recipe["mode"] == mode and recipe["content_prompt"] == "a red cube" and recipe["seed"] == 5


def test_the_router_of_calibrated(merge, run_node, sd15):
    merged, report, _ = merge("calibrated", solver="router")
    run_node("StyleLoomApplyLoRA", model=sd15[0], lora=merged, strength=1.0)
    assert "kept in shared layers" in report and "effective" not in report


def test_training_lowers_the_loss_and_shows_it(merge):
    _, report, masks = merge("train", steps=9, prior_weight=0.0, learning_rate=0.05)
    line = next(line for line in report.splitlines() if line.startswith("loss:"))
    first, last = float(line.split()[1]), float(line.split(",")[1].split()[0])
    assert last < first, line
    assert masks.shape[1] > 500, "the loss curve lies under the heat map"


def test_an_interrupt_keeps_the_best_masks(merge, monkeypatch):
    import comfy.model_management as mm

    done, original = [], torch.optim.Adam.step

    def step(self, *args, **kwargs):
        done.append(1)
        if len(done) == 2:
            mm.interrupt_current_processing()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    merged, report, _ = merge("train", steps=500)
    assert "Stopped at step 2 of 500: the best masks so far are kept" in report
    assert len(done) == 2 and len(merged) > 0 and not mm.processing_interrupted()


@pytest.mark.parametrize(("inputs", "words"), [
    ({"model": None}, "without model"), ({"clip": None}, "without clip"), ({"content_prompt": " \n"}, "content_prompt"),
    ({"style_prompt": ""}, "style_prompt is empty"),
    ({"content_latents": {"samples": torch.full((1, 4, 8, 8), float("nan"))}}, "content_latents"),
    ({"content_latents": {"samples": torch.zeros(1, 4, 8, 8)}, "style_latents": {"samples": torch.zeros(1, 4, 6, 8)}},
     "one size for both")])
def test_what_is_missing_is_said(inputs, words, merge):
    with pytest.raises(ValueError, match=words):
        merge("train", steps=1, **inputs)


def test_given_latents_are_used(merge):
    given = {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    for mode in ("calibrated", "train"):
        own = merge(mode, steps=2)[0]
        other = merge(mode, steps=2, content_latents=given, style_latents=given)[0]
        assert any(own[key].shape != other[key].shape or not torch.equal(own[key], other[key]) for key in own)


def test_a_model_whose_weights_were_loaded_in_inference_mode_can_be_trained_through(merge, kit, sd15):
    """As every loader node leaves it: autograd must not save such weights. Here it cannot be loaded again either."""
    with torch.inference_mode():
        model = kit.diffusion.sd15_small(**kit.architectures.SHORT["sd1.5"])
    assert all(p.is_inference() for p in model.model.diffusion_model.parameters()) and not model.cached_patcher_init
    flags = [p.requires_grad for p in model.model.parameters()]
    one, two = merge("train", steps=1, model=model)[1], merge("train", steps=1)[1]
    assert one.splitlines()[-1] == two.splitlines()[-1], "the same losses as with weights of the usual kind"
    assert [p.requires_grad for p in model.model.parameters()] == flags and changed_layers(model) == []
    assert not any(module.weight_function for module in model.model.modules() if hasattr(module, "weight_function"))
