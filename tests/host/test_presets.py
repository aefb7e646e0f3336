"""Presets of Asymmetric CFG, windows in steps, and the picture of the schedule."""

from __future__ import annotations

import importlib
from fractions import Fraction

import pytest
import torch
from shared_models import BOUND, ONE
from test_bad_input import refused


@pytest.fixture(scope="module")
def schedule(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.host.guidance.schedule")


@pytest.fixture(scope="module")
def sample(bench, run_node):
    """The sampler node: (samples, report, picture)."""

    def run(latent=None, steps=4, sampler="euler", **more):
        made, report, picture = run_node(
            "StyleLoomAsymmetricCFGSampler", model=more.pop("model", bench.model), positive=bench.positive,
            negative=bench.negative, latent_image=latent or bench.latent(), seed=5, steps=steps, cfg=3.5,
            sampler_name=sampler, scheduler="simple", denoise=1.0, **more,
        )  # fmt: skip
        return made["samples"], report, picture

    return run


@pytest.fixture(scope="module")
def two(bench, run_node):
    """(content, style, a stack of both)."""
    content, style = bench.lora(1, contains="attn2"), bench.lora(3, contains="attn2")
    stack = run_node("StyleLoomLoRAStack", lora=content, strength=0.9)[0]
    return content, style, run_node("StyleLoomLoRAStack", lora=style, strength=0.7, stack=stack)[0]


# --- windows in steps


@pytest.mark.parametrize("window", [(1, 35, 50), (15, 50, 50), (2, 2, 3)])
def test_the_same_share_of_any_number_of_steps(window, schedule):
    first, last, of = window
    made = schedule.StepWindow(first, last, of)
    assert list(made.inside(of)) == list(range(first - 1, last))
    for count in range(1, 120):
        middle = [Fraction(2 * i + 1, 2 * count) for i in range(count)]
        due = [i for i in range(count) if Fraction(first - 1, of) <= middle[i] < Fraction(last, of)]
        assert list(made.inside(count)) == due


def test_which_step_a_call_of_the_model_belongs_to(schedule):
    """Between two sigmas it is still the step before; a rounding above its sigma it is the step already."""
    falling = [14.6, 3.0, 1.0, 0.2, 0.0]
    for sigma, step in ((20.0, 0), (14.6, 0), (14.6 * (1 + 1e-6), 0), (3.1, 0), (3.0, 1), (3.0 * (1 + 1e-6), 1),
                        (2.99, 1), (0.2, 3), (0.05, 3), (0.0, 3)):  # fmt: skip
        assert schedule.step_of(sigma, falling) == step, sigma
    rising = falling[::-1]
    for sigma, step in ((0.0, 0), (0.1, 0), (0.2, 1), (0.2 * (1 - 1e-6), 1), (5.0, 3)):
        assert schedule.step_of(sigma, rising) == step, sigma


def test_the_sigmas_of_a_loop_that_tells_none(schedule, bench, two):
    """Then they are those that the host hands to every model call."""
    entry = schedule.BranchLoRA(two[0], steps=schedule.StepWindow(2, 3, 4))
    made, sigmas = schedule.Schedule(entry), torch.tensor([10.0, 5.0, 2.0, 1.0, 0.0])
    made.initialize_timesteps(bench.model.model)
    strengths = []
    for sigma in sigmas[:-1]:
        made.prepare_current_keyframe(sigma, {"sample_sigmas": sigmas})
        strengths.append(made.strength)
    assert strengths == [0.0, 1.0, 1.0, 0.0]


# --- presets


def test_as_wired_is_the_default_and_changes_nothing(sample, two):
    content, style, _ = two
    loras = {"positive_lora": content, "negative_lora": style, "positive_end_percent": 0.5}
    assert torch.equal(sample(steps=2, **loras)[0], sample(steps=2, preset="as wired", **loras)[0])


def test_craft_is_four_samplers_one_after_the_other(sample, two):
    """Of 4 steps: the content in 1 to 3, the style in 2 to 4, each at its own strength."""
    content, style, stack = two
    whole, report, _ = sample(positive_lora=stack, negative_lora=content, preset="CRAFT")
    assert "2602.18936" in report and "negative_lora is connected and not used (1 LoRAs)" in report
    assert "LoRA 1 by step: 1 to 3: 0.9, 4: 0" in report and "LoRA 2 by step: 1: 0, 2 to 4: 0.7" in report
    latent, on = None, {"return_with_leftover_noise": "enable"}
    parts = (0, 1, {"positive_lora": content, "positive_strength": 0.9}), (1, 3, {"positive_lora": stack}), (
        3, 4, {"positive_lora": style, "positive_strength": 0.7})  # fmt: skip
    for start, end, loras in parts:
        noise = "enable" if start == 0 else "disable"
        made = sample(latent, start_at_step=start, end_at_step=end, add_noise=noise, **on, **loras)[0]
        latent = {"samples": made}
    # What a sampler hands on goes once through the latent's scale and back.
    assert torch.allclose(made, whole, rtol=1e-4, atol=1e-3)
    first = sample(positive_lora=stack, preset="CRAFT", end_at_step=2, **on)[0]
    second, report, _ = sample(
        {"samples": first}, positive_lora=stack, preset="CRAFT", start_at_step=2, add_noise="disable"
    )
    assert torch.allclose(second, whole, rtol=1e-4, atol=1e-3), "the steps are those of all the schedule"
    assert "LoRA 1 by step: 3: 0.9, 4: 0" in report


def test_craft_in_the_guider(sample, two, bench):
    stack = two[2]
    guider = bench.guider(positive_lora=stack, preset="CRAFT")
    assert torch.equal(bench.through(guider, steps=4), sample(positive_lora=stack, preset="CRAFT")[0])
    assert "steps 1 to 35 of 50" in bench.report and "cfg here is 3.5" in bench.report


def test_craft_meets_what_was_set(sample, two):
    """A window of the artist's makes the preset's narrower, and a strength multiplies."""
    content, style, stack = two
    options = {"positive_lora": stack, "positive_strength": 0.5, "positive_start_percent": 0.4}
    _, report, _ = sample(preset="CRAFT", **options)
    assert "LoRA 1 by step: 1 to 2: 0, 3: 0.45, 4: 0" in report
    assert "LoRA 2 by step: 1 to 2: 0, 3 to 4: 0.35" in report


def test_positive_only(sample, two):
    content, style, _ = two
    made, report, _ = sample(steps=1, positive_lora=content, negative_lora=style, preset="positive only")
    assert torch.equal(made, sample(steps=1, positive_lora=content)[0])
    assert "not used (1 LoRAs)" in report and "runs without a LoRA" in report


def test_i2l(sample, two):
    content, style, _ = two
    loras = {"positive_lora": content, "negative_lora": style}
    made, report, _ = sample(steps=1, **loras, preset="i2L")
    assert torch.equal(made, sample(steps=1, **loras)[0]) and "2606.13809" in report


@pytest.mark.parametrize("more", (False, True))
def test_base_unconditional(more, bench, run_node, distance, two):
    """The truth: two models, the LoRAs of the model merged into the positive one only."""
    content, style, _ = two
    diff = {"diffusion_model.middle_block.1.proj_in.diff": torch.full((64, 64, 1, 1), 0.02)}
    patched = run_node("StyleLoomApplyLoRA", model=bench.model, lora=content, strength=0.8)[0]
    patched = run_node("StyleLoomApplyLoRA", model=patched, lora=content, strength=0.8)[0]
    patched = run_node("StyleLoomApplyLoRA", model=patched, lora=diff, strength=0.5)[0]
    before = {key: list(value) for key, value in patched.patches.items()}
    loras = {"positive_lora": style, "positive_strength": 0.6} if more else {}
    both = bench.asymmetric(model=patched, sampling=ONE, **loras)  # and the host has the patched weights in place
    made = bench.asymmetric(model=patched, preset="base unconditional", sampling=ONE, **loras)
    assert "without those that the model is patched with" in bench.report
    assert "positive LoRA (of the model): " in bench.report
    positive = [(content, 1.6), (diff, 0.5)] + ([(style, 0.6)] if more else [])
    truth = bench.truth(positive, [], sampling=ONE)
    assert distance(made, truth) < BOUND
    assert distance(made, both) > 100 * BOUND
    assert patched.patches == before


def test_base_unconditional_with_a_dora_on_the_model(bench, run_node, distance):
    """It has no form beside the layer: weight hooks take it, on the positive side alone."""
    dora = bench.lora(4, kind="dora", contains="middle_block.1.transformer_blocks.0.attn2.to_q")
    patched = run_node("StyleLoomApplyLoRA", model=bench.model, lora=dora, strength=1.0)[0]
    made = bench.asymmetric(model=patched, preset="base unconditional", sampling=ONE)
    assert distance(made, bench.truth([(dora, 1.0)], [], sampling=ONE)) < BOUND
    twice = run_node("StyleLoomApplyLoRA", model=patched, lora=dora, strength=1.0)[0]
    refused(bench.guider, "several LoRAs on .* depends on what", model=twice, preset="base unconditional")


def test_a_merge_is_the_model_and_a_bypass_is_refused(bench, run_node, two):
    content, style, _ = two
    other = bench.fresh()
    merged = run_node("ModelMergeSimple", model1=bench.model, model2=other, ratio=0.5)[0]
    on_top = run_node("StyleLoomApplyLoRA", model=merged, lora=content, strength=0.8)[0]
    guider = bench.guider(model=on_top, preset="base unconditional")
    assert {key: len(value) for key, value in guider.model_patcher.patches.items()} == {
        key: len(value) for key, value in merged.patches.items()}  # fmt: skip
    patched = run_node("StyleLoomApplyLoRA", model=bench.model, lora=content, strength=0.8)[0]
    late = run_node("ModelMergeSimple", model1=patched, model2=other, ratio=0.5)[0]
    refused(bench.guider, "merged with another one after a LoRA", model=late, preset="base unconditional")
    beside = run_node("LoraModelLoader", model=bench.model, lora=content, strength_model=1.0, bypass=True)[0]
    refused(bench.guider, "Bypass loader", model=beside, preset="base unconditional")


def test_a_parameter_that_apply_lora_has_exchanged_is_refused(benches, run_node):
    """It would stay on the negative side, without a word."""
    bench, token = benches("z-image"), "diffusion_model.x_pad_token"
    lora = bench.lora(1) | {f"{token}.diff": torch.ones_like(bench.model.get_model_object(token))}
    patched = run_node("StyleLoomApplyLoRA", model=bench.model, lora=lora, strength=1.0)[0]
    words = f"(?s)exchanged whole: {token}.*positive_lora"
    refused(bench.guider, words, model=patched, preset="base unconditional")
    bench.guider(model=patched)


@pytest.mark.parametrize(
    ("preset", "given", "words"),
    [
        ("i2L", "", "preset is i2L, and positive_lora is not connected"),
        ("i2L", "positive", "preset is i2L, and negative_lora is not connected"),
        ("i2L", "positive negative weak", "negative_lora has strength 0"),
        ("positive only", "negative", "positive_lora is not connected"),
        ("base unconditional", "negative", "there is no LoRA: none on the model and none in positive_lora"),
        ("CRAFT", "positive", "for two LoRAs on the positive side, and positive_lora has 1"),
        ("CRAFT", "", "positive_lora has 0"),
        ("nothing", "", "preset is 'nothing'"),
    ],
)
def test_what_a_preset_is_not_for(preset, given, words, bench, two):
    loras = {f"{side}_lora": two[0] for side in ("positive", "negative") if side in given}
    if "weak" in given:
        loras["negative_strength"] = 0.0
    refused(bench.guider, words, preset=preset, **loras)


# --- the picture


def test_the_picture_shows_the_strengths(sample, two, run_node, host):
    """A bar stands in the columns of the steps in which a LoRA acts, in the colour of its side, and nowhere else."""
    content, style, stack = two
    frames = run_node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)[0]
    frames = run_node("CreateHookKeyframe", strength_mult=-0.5, start_percent=0.5, prev_hook_kf=frames)[0]
    late = run_node("StyleLoomLoRAStack", lora=style, strength=0.8, keyframes=frames)[0]
    _, report, picture = sample(positive_lora=stack, preset="as wired", negative_lora=late, negative_start_percent=0.2)
    assert "negative LoRA 1 by step: 1: 0, 2: 0.8, 3 to 4: -0.4" in report
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert picture.dtype == torch.float32 and 0 <= picture.min() and picture.max() <= 1
    pixels = (picture[0] * 255).round().to(torch.int32)
    colours = {"positive": (40, 90, 160), "negative": (190, 90, 30)}
    columns = 40  # pixels a step, and where the first begins
    for number, (side, acts) in enumerate(
        (("positive", "++++"), ("positive", "++++"), ("negative", "0+--"))
    ):
        floor = 84 + number * 100 + (28 if "-" in acts else 56)
        for step, sign in enumerate(acts):
            bar = pixels[84 + number * 100 : 84 + number * 100 + 57, 68 + step * columns + 5]
            rows = (bar == torch.tensor(colours[side], dtype=torch.int32)).all(-1).nonzero().flatten()
            above = (rows < floor - 84 - number * 100).any() if len(rows) else False
            below = (rows > floor - 84 - number * 100).any() if len(rows) else False
            assert (bool(above), bool(below)) == (sign == "+", sign == "-"), (number, step)


def test_a_run_of_no_steps_and_of_no_lora(sample, bench):
    made, report, picture = sample(bench.latent(), start_at_step=9, steps=4)
    assert torch.equal(made, bench.latent()["samples"]) and "by step" not in report and picture.shape[1] > 100


def test_a_strength_that_changes_in_every_step_in_words(pack):
    plot = importlib.import_module(f"{pack.__name__}.nodes.host.guidance.schedule_plot")
    lane = plot.Lane(0, "positive LoRA 1", [i / 10 for i in range(20)])
    (line,) = plot.in_words([lane], 4)
    assert line == ("positive LoRA 1 by step: 5: 0, 6: 0.1, 7: 0.2, 8: 0.3, 9: 0.4, 10: 0.5, 11: 0.6, …, 24: 1.9")
    assert plot.in_words([plot.Lane(0, "x", [0.5] * 9)], 0) == []
    many = plot.draw([lane] * 50, torch.linspace(1, 0, 21), 0, 4.0)
    assert many.shape[1] < 5000 and plot.draw([lane], torch.linspace(1, 0, 1001), 0, 4.0).shape[2] < 4000
