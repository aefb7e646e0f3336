"""The pack's nodes with one another: a style injected, two LoRA states, a merged LoRA, in one sampling run."""

from __future__ import annotations

import pytest
import torch

# Untrained weights with a loud style amplify rounding from step to step, by a factor that depends on the seed.
STEPS = {"steps": 1, "seed": 6}


@pytest.fixture(scope="module")
def bench(benches):
    """All blocks: an IP-Adapter's file counts the layers, and the LoRA files of the kit name them all."""
    return benches("sdxl", short=False)


@pytest.fixture(scope="module")
def inject(run_node, encode):
    adapter = run_node("StyleLoomLoadIPAdapter", ipadapter_name="kit/ip_adapter_sdxl_small.safetensors")[0]
    style = {"style0": encode(1)}
    given = {"ipadapter": adapter, "style": style, "preset": "style", "weight": 1.0}
    return lambda model, **more: run_node("StyleLoomStyleBlockInjector", model=model, **given, **more)[0]


def test_a_style_injected_under_two_lora_states(bench, inject, run_node, kit):
    """Against two models of their own, each with the style, one with the merged LoRA as well."""
    names = [f"kit/sdxl_{role}.safetensors" for role in ("content", "style")]
    loras = [run_node("StyleLoomLoadLoRA", lora_name=name)[0] for name in names]
    merged = run_node("StyleLoomZipRankMerge", content_lora=loras[0], style_lora=loras[1])[0]
    both = {"positive_lora": merged, "negative_lora": loras[1], "negative_strength": 0.4, "sampling": STEPS}
    ours = bench.asymmetric(model=inject(bench.model), **both)
    truth = bench.routed([(merged, 1.0)], [(loras[1], 0.4)], change=inject, sampling=STEPS)
    assert kit.two_passes.distance(ours, truth) < 1e-4
    without = bench.asymmetric(**both)
    assert kit.two_passes.distance(without, truth) > 0.01


def test_a_filtered_lora_on_one_side(bench, run_node, kit):
    """Style blocks only, through the same key map as any other LoRA."""
    lora = run_node("StyleLoomLoadLoRA", lora_name="kit/sdxl_style.safetensors")[0]
    filtered = run_node("StyleLoomLoRABlockFilter", lora=lora, preset="style blocks", inside=1.0, outside=0.0)[0]
    assert 0 < len(filtered) < len(lora)
    ours = bench.asymmetric(positive_lora=filtered, sampling=STEPS)
    assert kit.two_passes.distance(ours, bench.truth([(filtered, 1.0)], sampling=STEPS)) < 1e-4
    assert torch.isfinite(ours).all()


def test_a_style_with_a_mask_beside_a_lora_with_a_mask(bench, inject, run_node, kit):
    """Masks that cover everything: as without masks. Each tells its layers of the latent, and of that alone."""
    lora = run_node("StyleLoomLoadLoRA", lora_name="kit/sdxl_style.safetensors")[0]
    white = torch.ones(1, 64, 96)

    def sample(mask=None):
        entry = bench.run("StyleLoomLoRAStack", lora=lora, strength=0.8, mask=mask, text_tokens="whole")[0]
        return bench.asymmetric(model=inject(bench.model, mask=mask), positive_lora=entry, sampling=STEPS)

    assert kit.two_passes.distance(sample(white), sample()) < 1e-4
