"""Asymmetric CFG Sampler: the host's KSampler, bit for bit, with another guider."""

from __future__ import annotations

import pytest
import torch
from shared_models import BOUND, ONE


@pytest.fixture
def both(bench, run_node):
    """(ours without LoRAs, the host's KSampler or KSampler (Advanced)) on the same inputs."""

    def run(latent=None, denoise=1.0, advanced=None, sampler="euler", scheduler="normal", steps=3):
        common = {
            "model": bench.model, "positive": bench.positive, "negative": bench.negative, "steps": steps, "cfg": 3.0,
            "sampler_name": sampler, "scheduler": scheduler, "latent_image": latent or bench.latent(),
        }  # fmt: skip
        ours = run_node("StyleLoomAsymmetricCFGSampler", **common, seed=9, denoise=denoise, **(advanced or {}))[0]
        if advanced is None:
            return ours, run_node("KSampler", **common, seed=9, denoise=denoise)[0]
        defaults = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000}
        defaults["return_with_leftover_noise"] = "disable"
        return ours, run_node("KSamplerAdvanced", **common, noise_seed=9, **{**defaults, **advanced})[0]

    return run


def picture(bench, batch=1):
    return {"samples": torch.randn(batch, 4, 8, 12, generator=torch.Generator().manual_seed(2))}


def equal(ours, core):
    assert ours.keys() == core.keys()
    assert ours["samples"].dtype == core["samples"].dtype
    assert torch.equal(ours["samples"], core["samples"])
    assert ours["samples"].isfinite().all()


@pytest.mark.parametrize("denoise", (1.0, 0.6, 0.0))
def test_denoise(denoise, both, bench):
    equal(*both(picture(bench), denoise))


@pytest.mark.parametrize("sampler", ("uni_pc", "dpm_2_ancestral", "ddim", "dpmpp_2m_sde"))
def test_samplers(sampler, both, bench):
    """Among them those that leave a sigma out, and those with noise of their own."""
    equal(*both(picture(bench), 0.7, sampler=sampler, scheduler="karras"))


@pytest.mark.parametrize(
    "advanced",
    [
        {},
        {"add_noise": "disable"},
        {"start_at_step": 1},
        {"end_at_step": 2},
        {"end_at_step": 2, "return_with_leftover_noise": "enable"},
        {"start_at_step": 1, "end_at_step": 2, "add_noise": "disable", "return_with_leftover_noise": "enable"},
        {"start_at_step": 3},
        {"start_at_step": 2, "end_at_step": 1},
        {"end_at_step": 0},
        {"end_at_step": 3},
    ],
)
def test_parts_of_sampling(advanced, both, bench):
    equal(*both(picture(bench), advanced=advanced))


@pytest.mark.parametrize("advanced", (None, {}))
def test_what_a_latent_brings_along(advanced, both, bench):
    latent = picture(bench, 2) | {"batch_index": [4, 1], "noise_mask": torch.rand(1, 1, 64, 96)}
    equal(*both(latent, advanced=advanced))


def test_an_empty_latent_of_other_channels(both):
    """The host gives it the model's channels, and drops what said how it was made."""
    equal(*both({"samples": torch.zeros(1, 16, 8, 12), "downscale_ratio_spacial": 8}))


def test_the_hosts_dtype_of_results(both, bench, host, monkeypatch):
    monkeypatch.setattr(host.comfy.cli_args.args, "fp16_intermediates", True)
    equal(*both(picture(bench), denoise=0.5))


def test_equals_the_guider_with_the_custom_sampler(bench, run_node):
    style, gray = bench.lora(1), bench.lora(2)
    loras = {"positive_lora": style, "negative_lora": gray, "negative_strength": 0.5, "positive_end_percent": 0.5}
    node, report, _ = run_node(
        "StyleLoomAsymmetricCFGSampler", model=bench.model, positive=bench.positive, negative=bench.negative,
        latent_image=bench.latent(), seed=5, steps=2, cfg=3.5, sampler_name="euler", scheduler="simple", denoise=1.0,
        **loras,
    )  # fmt: skip
    assert torch.equal(node["samples"], bench.asymmetric(**loras))
    lines, before = report.splitlines(), bench.report.splitlines()
    assert lines[:-2] == before[:-1]  # what the LoRAs are, then what sampling has shown, or where it will be said
    assert lines[-2] == "sampled with both sides in one batch, in 2 of 2 evaluations" and "the log says why" in before[-1]
    assert lines[-1] == "positive LoRA 1 by step: 1: 1, 2: 0"


def test_two_samplers_one_after_the_other(bench, run_node):
    """The second goes on with the noise that the first left, with another LoRA: as two windows do."""
    style, other = bench.lora(1), bench.lora(3)
    common = {
        "model": bench.model, "positive": bench.positive, "negative": bench.negative, "seed": 5, "steps": 2, "cfg": 3.5,
        "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    first = run_node(
        "StyleLoomAsymmetricCFGSampler", **common, latent_image=bench.latent(), positive_lora=style, end_at_step=1,
        return_with_leftover_noise="enable",
    )[0]  # fmt: skip
    second = run_node(
        "StyleLoomAsymmetricCFGSampler", **common, latent_image=first, positive_lora=other, start_at_step=1,
        add_noise="disable",
    )[0]  # fmt: skip
    stack = run_node("StyleLoomLoRAStack", lora=style, strength=1.0, end_percent=0.4)[0]
    stack = run_node("StyleLoomLoRAStack", lora=other, strength=1.0, start_percent=0.4, stack=stack)[0]
    whole = bench.asymmetric(positive_lora=stack)
    assert torch.allclose(second["samples"], whole, rtol=1e-4, atol=1e-3)


def test_two_calls_are_said_in_the_report(benches, run_node, distance, caplog):
    """A layer that gets the tokens as rows, and in them both sides: what is learned while sampling is in the report."""
    bench = benches("flux2")

    class Across(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    def model():
        made = bench.fresh()
        block = made.model.diffusion_model.double_blocks[0]
        block.img_mlp = Across(*block.img_mlp)
        return made

    style = bench.lora(1)
    common = {"positive": bench.positive, "negative": bench.negative, "cfg": 3.5, "positive_lora": style}
    node, report, *_ = run_node(
        "StyleLoomAsymmetricCFGSampler", model=model(), latent_image=bench.latent(), seed=5, steps=1,
        sampler_name="euler", scheduler="simple", denoise=1.0, **common,
    )  # fmt: skip
    words = "sampled with the sides one after the other, which gives the same picture in more time: a layer of"
    assert words in report and words in caplog.text
    assert distance(node["samples"], bench.truth([(style, 1.0)], sampling=ONE)) < BOUND
    assert "the log says why" in run_node("StyleLoomAsymmetricCFGGuider", model=bench.model, **common)[1]
