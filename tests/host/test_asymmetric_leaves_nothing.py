"""What Asymmetric CFG leaves on the model, the LoRAs and the conditionings: nothing, also after an exception or an
interrupt."""

from __future__ import annotations

import copy

import pytest
import torch
from shared_models import SIDES


@pytest.fixture(scope="module")
def sides(bench):
    """LoRAs with a part for the host's weight hooks too, on the positive side."""
    style = bench.lora(1, contains="attn1") | bench.lora(1, kind="dora", contains="attn2.to_v")
    return {"positive_lora": style, "negative_lora": bench.lora(2, rank=3), **SIDES}


@pytest.fixture(scope="module")
def low_rank(bench):
    return {"positive_lora": bench.lora(1), "negative_lora": bench.lora(2, rank=3), **SIDES}


def frozen(value):
    """A copy of plain containers that compares by what is in them; all else by identity."""
    if isinstance(value, dict):
        return {key: frozen(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(entry) for entry in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def state(model):
    """Everything of a MODEL that a run could have changed."""
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    forwards = {
        name: id(module.__dict__["forward"])
        for name, module in model.model.named_modules()
        if "forward" in module.__dict__
    }
    parts = {
        name: frozen(getattr(model, name))
        for name in ("model_options", "patches", "object_patches", "wrappers", "callbacks", "injections", "attachments",
                     "additional_models", "hook_patches", "cached_hook_patches", "hook_backup", "forced_hooks",
                     "is_injected", "hook_mode")
    }  # fmt: skip
    return weights, forwards, parts, {name: id(module) for name, module in model.model.named_modules()}


def same(before, after):
    assert before[0].keys() == after[0].keys()
    changed = [name for name in before[0] if not torch.equal(before[0][name], after[0][name])]
    assert not changed
    assert before[1:] == after[1:]


def failing(model, call, what):
    """The model, with something that happens in its first or second call, inside a layer in the middle of the net."""
    layers = sum(name.endswith("attn2") for name, _ in model.model.diffusion_model.named_modules())
    when = (call - 1) * layers + layers // 2
    model, calls = model.clone(), []

    def happen(out, extra_options):
        calls.append(None)
        if len(calls) == when:
            what()
        return out

    model.set_model_attn2_output_patch(happen)
    return model


def test_model_and_conditionings_stay_as_they_are(bench, sides):
    model, prompts = bench.fresh(), [copy.deepcopy(bench.positive), copy.deepcopy(bench.negative)]
    kept = [frozen(bench.positive), frozen(bench.negative)]
    bench.symmetric()  # loads a model, so that loading is not what is seen
    before = state(model)
    bench.asymmetric(model=model, **sides)
    assert "weight hooks" in bench.report
    same(before, state(model))
    assert kept == [frozen(bench.positive), frozen(bench.negative)]
    for was, is_ in zip(prompts, (bench.positive, bench.negative), strict=True):
        assert torch.equal(was[0][0], is_[0][0]) and was[0][1].keys() == is_[0][1].keys()


def test_loras_stay_as_they_are(bench, sides, low_rank):
    for given in (sides, low_rank):
        kept = {
            (side, name): t.clone() for side in ("positive", "negative") for name, t in given[f"{side}_lora"].items()
        }
        bench.asymmetric(sampling={"steps": 1}, **given)
        assert all(torch.equal(t, given[f"{side}_lora"][name]) for (side, name), t in kept.items())


@pytest.mark.parametrize("call", (1, 2))
def test_an_exception_inside_the_model(call, bench, sides):

    def what():
        raise RuntimeError("on purpose")

    model = failing(bench.fresh(), call, what)
    before = state(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        bench.asymmetric(model=model, **sides)
    same(before, state(model))


def test_an_interrupt_during_a_step(bench, low_rank, host):
    """As with the Cancel button; the next run on the same model gives what it would have given."""
    management = host.comfy.model_management
    before_all = bench.asymmetric(**low_rank)
    inner = bench.fresh()
    model = failing(inner, 2, lambda: management.interrupt_current_processing(True))
    before = state(model)
    with pytest.raises(management.InterruptProcessingException):
        bench.asymmetric(model=model, **low_rank)
    same(before, state(model))
    assert torch.equal(bench.asymmetric(model=inner, **low_rank), before_all)


def test_the_same_guider_gives_the_same_bits_again(bench, sides, low_rank):
    for given in (sides, low_rank):
        guider = bench.guider(**given)
        assert torch.equal(bench.through(guider), bench.through(guider))


def test_a_guider_that_failed_works_again(bench, low_rank):
    """Also where the guider itself is used again after an exception."""
    what = []
    model = failing(bench.model, 2, lambda: what and what.pop()())
    guider = bench.guider(model=model, **low_rank)

    def fail():
        raise RuntimeError("on purpose")

    what.append(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        bench.through(guider)
    assert torch.equal(bench.through(guider), bench.asymmetric(**low_rank))


def test_guiders_of_one_model_do_not_disturb_each_other(bench, low_rank):
    """Made in a row, used in another order; a plain guider of the same model between them."""
    other = {"positive_lora": bench.lora(5), "negative_strength": 1.0}
    first, second = bench.guider(**low_rank), bench.guider(**other)
    plain = bench.run("CFGGuider", model=bench.model, positive=bench.positive, negative=bench.negative, cfg=3.5)[0]
    made = [bench.through(guider) for guider in (second, plain, first, plain, second)]
    assert torch.equal(made[0], made[4]) and torch.equal(made[1], made[3])
    assert torch.equal(made[1], bench.symmetric())
    assert torch.equal(made[2], bench.asymmetric(model=bench.fresh(), **low_rank))
    assert not torch.equal(made[0], made[2])


def test_no_weight_is_patched_during_sampling(bench, low_rank, host, monkeypatch):
    """Counted in the host's own patcher, from before the run to its end; a merged LoRA beside it shows the count."""
    patcher, counts = host.comfy.model_patcher.ModelPatcher, []
    for name in ("patch_weight_to_device", "patch_hook_weight_to_device"):
        whole = getattr(patcher, name)

        def count(self, *args, whole=whole, name=name, **kwargs):
            key = args[0] if name == "patch_weight_to_device" else args[2]
            if name != "patch_weight_to_device" or key in self.patches:
                counts.append(key)
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(patcher, name, count)
    bench.asymmetric(model=bench.fresh(), **low_rank)
    assert not counts
    bench.through(bench.run("CFGGuider", positive=bench.positive, negative=bench.negative, cfg=3.5, model=bench.run(
        "StyleLoomApplyLoRA", model=bench.fresh(), lora=low_rank["positive_lora"])[0])[0])  # fmt: skip
    assert counts
