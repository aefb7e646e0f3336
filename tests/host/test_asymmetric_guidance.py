"""Guidance as expected: cfg 1, guidance nodes with passes of their own, windows and strengths from step to step."""

from __future__ import annotations

import sys

import pytest
import torch
from shared_models import BOUND, ONE


def test_cfg_1_runs_the_positive_side_alone(bench, loras, kit, distance, run_node):
    ours, (positive, _) = loras()
    model, calls = kit.two_passes.recorded(bench.model)
    made = bench.asymmetric(model=model, cfg=1.0, **ours)
    assert calls == [((0,), 1)] * 2
    assert distance(made, bench.symmetric(*positive, cfg=1.0)) < BOUND
    guider = run_node(
        "StyleLoomAsymmetricCFGGuider", model=bench.model, positive=bench.positive, cfg=1.0,
        positive_lora=ours["positive_lora"], positive_strength=0.8,
    )[0]  # fmt: skip
    assert torch.equal(bench.through(guider), made)


@pytest.mark.parametrize("given", ({"cfg": 4.0}, {"cfg": 1.0, "negative_lora": True}))
def test_a_missing_negative_is_refused(given, bench, loras, run_node, pack):
    if "negative_lora" in given:
        given = {**given, "negative_lora": loras()[0]["negative_lora"]}
    with pytest.raises(ValueError, match="negative is not connected"):
        run_node("StyleLoomAsymmetricCFGGuider", model=bench.model, positive=bench.positive, **given)


def test_disable_cfg1_optimization(bench, loras, kit, distance):
    """Both sides run with cfg 1 where a node asks for it, and pre-CFG functions get both results."""
    seen = []

    def change(model):
        model = model.clone()
        model.set_model_sampler_pre_cfg_function(
            lambda args: [seen.append(args["conds_out"]) or args["conds_out"][0], args["conds_out"][1]],
            disable_cfg1_optimization=True,
        )
        return model

    ours, truth = loras()
    model, calls = kit.two_passes.recorded(change(bench.model))
    made = bench.asymmetric(model=model, cfg=1.0, sampling=ONE, **ours)
    assert calls == [((1, 0), 2)] or sorted(calls) == [((0,), 1), ((1,), 1)]
    mine = seen.pop()
    assert distance(made, bench.routed(*truth, cfg=1.0, sampling=ONE, change=change)) < BOUND
    assert all(distance(a, b) < BOUND for a, b in zip(mine, seen.pop(), strict=True))


def sd3_style_skip(run_node, model):
    return run_node("SkipLayerGuidanceDiT", model=model, double_layers="0", single_layers="1", scale=2.0,
                    start_percent=0.0, end_percent=1.0, rescaling_scale=0.3)[0]  # fmt: skip


GUIDANCE = {
    "RescaleCFG": ("sd1.5", lambda run, model: run("RescaleCFG", model=model, multiplier=0.7)[0]),
    "APG": ("sd1.5", lambda run, model: run("APG", model=model, eta=0.5, norm_threshold=5.0, momentum=-0.5)[0]),
    "CFGZeroStar": ("flux2", lambda run, model: run("CFGZeroStar", model=model)[0]),
    "PerturbedAttentionGuidance": (
        "sd1.5", lambda run, model: run("PerturbedAttentionGuidance", model=model, scale=2.0)[0]),
    "SelfAttentionGuidance": ("sd1.5", lambda run, model: run("SelfAttentionGuidance", model=model, scale=0.7)[0]),
    "SkipLayerGuidanceDiT": ("flux2", sd3_style_skip),
    "SkipLayerGuidanceDiTSimple": (
        "flux2", lambda run, model: run("SkipLayerGuidanceDiTSimple", model=model, double_layers="0",
                                        single_layers="0, 1", start_percent=0.0, end_percent=1.0)[0]),
    "PAG and RescaleCFG": (
        "sd1.5", lambda run, model: run("RescaleCFG", multiplier=0.5, model=run(
            "PerturbedAttentionGuidance", model=model, scale=1.0)[0])[0]),
}  # fmt: skip


@pytest.mark.parametrize("node", GUIDANCE)
def test_guidance_nodes(node, benches, loras, distance, run_node):
    """An extra pass of a node belongs to the side whose conditioning it runs: perturbed attention and skipped layers to
    the positive side, SAG and the simple form of skipped layers to the negative side."""
    name, patch = GUIDANCE[node]
    bench = benches(name)
    ours, truth = loras(name)
    # SAG blurs by the attention of the middle block, which has to have a few tokens.
    latent = {"samples": torch.zeros(1, 4, 16, 16)} if node == "SelfAttentionGuidance" else bench.latent()
    made = bench.asymmetric(model=patch(run_node, bench.model), latent=latent, **ours)
    expected = bench.routed(*truth, latent=latent, change=lambda model: patch(run_node, model))
    assert distance(made, expected) < BOUND
    assert distance(made, bench.asymmetric(latent=latent, **ours)) > 1e-3, "the node does nothing here"


def stepwise(bench, sides, sigmas):
    """Euler, one step after the other, each on models merged for it alone: what a window or keyframes have to equal.

    sides: for each step what `truth` takes.
    """
    latent, noise = bench.latent(), None
    for i, both in enumerate(sides):
        made = bench.truth(*both, latent=latent, sampling={"sigmas": sigmas[i : i + 2], "noise": noise})
        latent, noise = {"samples": made}, bench.run("DisableNoise")[0]
    return latent["samples"]


@pytest.mark.parametrize(
    ("window", "acts"),
    [((0.0, 0.5), (1, 1, 0)), ((0.2, 0.5), (0, 1, 0)), ((0.5, 1.0), (0, 0, 1)), ((0.4, 0.6), (0, 0, 0))],
)
def test_windows(window, acts, bench, loras, distance):
    """Three steps at 0, 33 and 67 percent; the negative LoRA has the rest."""
    (style, gray), sigmas = (loras()[0][f"{side}_lora"] for side in ("positive", "negative")), bench.sigmas(3)
    start, end = window
    made = bench.asymmetric(
        positive_lora=style, negative_lora=gray, positive_start_percent=start, positive_end_percent=end,
        negative_end_percent=0.5, sampling={"steps": 3},
    )  # fmt: skip
    sides = [([(style, 1.0)] * acts[i], [(gray, 1.0)] * (i < 2)) for i in range(3)]
    assert distance(made, stepwise(bench, sides, sigmas)) < BOUND


@pytest.fixture(scope="module")
def schedule(pack):
    return sys.modules[f"{pack.__name__}.nodes.host.guidance.schedule"]


@pytest.mark.parametrize("name", ("sd1.5", "z-image", "flux2"))
def test_a_window_ends_where_a_conditionings_range_ends(name, benches, schedule, host):
    """Also where a step stands exactly on the boundary: the host's own rule decides, in the host's own precision."""
    bench = benches(name)
    wrong = []
    for steps in (4, 5, 10):
        for sigma in bench.sigmas(steps)[:-1]:
            for p in range(0, 101, 5):
                for start, end in ((p / 100, 1.0), (0.0, p / 100)):
                    if start >= end:
                        continue
                    made = schedule.Schedule(schedule.BranchLoRA({}, 1.0, start, end))
                    made.initialize_timesteps(bench.model.model)
                    made.prepare_current_keyframe(sigma, {})
                    cond = {"start_percent": start, "end_percent": end, "model_conds": {}, "uuid": 0}
                    conds = [cond]
                    host.comfy.samplers.calculate_start_end_timesteps(bench.model.model, conds)
                    x = torch.zeros(1, 1, 1, 1)
                    inside = host.comfy.samplers.get_area_and_mult(conds[0], x, sigma[None]) is not None
                    if inside != bool(made.strength):
                        wrong.append((steps, float(sigma), start, end, inside))
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"


def test_keyframes_and_a_stack(bench, distance, run_node):
    """Strength from step to step by the host's keyframes, times a LoRA's own strength, in a window; LoRAs add up."""
    one, two = bench.lora(1), bench.lora(2, rank=2)
    frames = run_node("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)[0]
    frames = run_node("CreateHookKeyframe", strength_mult=-1.0, start_percent=0.3, prev_hook_kf=frames)[0]
    frames = run_node("CreateHookKeyframe", strength_mult=0.25, start_percent=0.6, prev_hook_kf=frames)[0]
    stack = run_node("StyleLoomLoRAStack", lora=one, strength=0.8, keyframes=frames)[0]
    stack = run_node("StyleLoomLoRAStack", lora=two, strength=0.5, stack=stack, end_percent=0.5)[0]
    factors = (0.5, -1.0, 0.25)
    guider = bench.guider(positive_lora=stack, positive_strength=0.5)
    made = bench.through(guider, steps=3)
    sides = [([(one, 0.4 * factors[i])] + [(two, 0.25)] * (i < 2), []) for i in range(3)]
    expected = stepwise(bench, sides, bench.sigmas(3))
    assert distance(made, expected) < BOUND
    assert torch.equal(bench.through(guider, steps=3), made), "keyframes have to begin again with each run"


def test_keyframes_move_what_goes_through_weight_hooks_too(bench, distance, run_node):
    lora = bench.lora(1, kind="dora", contains="attn2") | bench.lora(1, contains="attn1")
    frames = run_node("CreateHookKeyframe", strength_mult=0.5, start_percent=0.0)[0]
    frames = run_node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.4, prev_hook_kf=frames)[0]
    stack = run_node("StyleLoomLoRAStack", lora=lora, strength=0.8, keyframes=frames, end_percent=0.9)[0]
    made = bench.asymmetric(positive_lora=stack)
    expected = stepwise(bench, [([(lora, 0.4)], []), ([(lora, 0.8)], [])], bench.sigmas(2))
    assert distance(made, expected) < BOUND


@pytest.mark.parametrize("given", ({"positive_strength": 0.0, "negative_strength": 0.0}, {}))
def test_strength_0_is_plain_cfg_and_touches_nothing(given, bench, loras, monkeypatch):
    touched = []
    setattr_ = torch.nn.Module.__setattr__

    def note(self, name, value):
        if name == "forward":
            touched.append(self)
        setattr_(self, name, value)

    sides = {name: value for name, value in loras()[0].items() if name.endswith("lora")} if given else {}
    guider = bench.guider(**sides, **given)
    monkeypatch.setattr(torch.nn.Module, "__setattr__", note)
    made = bench.through(guider)
    assert not touched
    assert torch.equal(made, bench.symmetric())
    assert "the model as it is" in bench.report


def test_windows_that_do_not_meet_are_said(bench, run_node, distance):
    """A LoRA of the first half on a side of the second half acts nowhere; the report says so."""
    stack = run_node("StyleLoomLoRAStack", lora=bench.lora(), strength=1.0, end_percent=0.5)[0]
    ours = bench.asymmetric(positive_lora=stack, positive_start_percent=0.6)
    assert "positive: 1 of 1 LoRAs left out" in bench.report and "lie outside those of the positive side" in bench.report
    assert distance(ours, bench.symmetric()) == 0
