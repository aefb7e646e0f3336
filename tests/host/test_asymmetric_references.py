"""Reference pictures that stand at sigma 0: the time embedding then runs over the whole batch twice."""

from __future__ import annotations

import pytest
import torch

CASES = [
    ("flux2", "index"),
    ("flux2", "index_timestep_zero"),
    ("qwen-image", "index_timestep_zero"),
    ("z-image", "omni"),
]


@pytest.fixture
def with_references(run_node, kit):
    """A conditioning with two reference latents, as the stock edit nodes make it."""

    def add(bench, conditioning, method, seed=1, texts=("one", "two", "three")):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(2):
            latent = {"samples": torch.randn(1, *kit.two_passes.LATENTS[bench.name], generator=generator)}
            conditioning = run_node("ReferenceLatent", conditioning=conditioning, latent=latent)[0]
        if method != "omni":
            return run_node(
                "FluxKontextMultiReferenceLatentMethod",
                conditioning=conditioning,
                reference_latents_method=method,
            )[0]
        # What Text Encode Z-Image Omni hands over: one text for each picture, and one for the rest.
        embeds = [bench.prompt(text)[0][0] for text in texts]
        return [[c, {**values, "reference_latents_text_embeds": embeds}] for c, values in conditioning]

    return add


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize(("name", "method"), CASES)
def test_references_on_both_sides(name, method, batch, benches, with_references, kit, caplog):
    """Same prompt on both sides: they stand in one batch, so that the doubled rows have to be told apart."""
    bench = benches(name)
    style, gray = bench.lora(1), bench.lora(2)
    # No text for the rest: with one the host's Z-Image fails on any batch of more than one, in plain CFG too.
    prompt = with_references(bench, bench.positive, method, texts=("one", "two"))
    sides = {"positive": prompt, "negative": prompt, "latent": bench.latent(batch)}
    model, calls = kit.two_passes.recorded(bench.model)
    made = bench.asymmetric(model=model, positive_lora=style, negative_lora=gray, sampling={"steps": 1}, **sides)
    expected = bench.truth([(style, 1.0)], [(gray, 1.0)], sampling={"steps": 1}, **sides)
    assert calls == [((1, 0), 2 * batch)]
    assert not [record for record in caplog.records if "one after the other" in record.getMessage()]
    assert kit.two_passes.distance(made, expected) < 1e-4
    without = bench.asymmetric(
        positive_lora=style, negative_lora=gray, sampling={"steps": 1}, latent=bench.latent(batch),
        positive=bench.positive, negative=bench.positive,
    )  # fmt: skip
    assert kit.two_passes.distance(made, without) > 0.01, "the reference is not seen"


@pytest.mark.parametrize(("name", "method"), [case for case in CASES if case[1] != "index"])
def test_references_on_one_side(name, method, benches, with_references, kit):
    bench = benches(name)
    style, gray = bench.lora(1), bench.lora(2)
    sides = {"positive": with_references(bench, bench.positive, method), "negative": bench.positive}
    made = bench.asymmetric(positive_lora=style, negative_lora=gray, sampling={"steps": 1}, **sides)
    expected = bench.truth([(style, 1.0)], [(gray, 1.0)], sampling={"steps": 1}, **sides)
    assert kit.two_passes.distance(made, expected) < 1e-4
