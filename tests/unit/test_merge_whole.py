"""Two whole LoRAs: what is shared, what passes through, what is refused."""

from __future__ import annotations

import pytest
import torch
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.lora.reading import read_lora
from styleloom.weights.lora.writing import write_lora
from styleloom.weights.merge.calibrated import solve_calibrated
from styleloom.weights.merge.two_loras import assemble, prepare, solve_fast
from styleloom.weights.merge.alignment import align, check_sizes, pass_other
from styleloom.weights.merge.several_loras import merge_many
from styleloom.weights.merge.methods import METHODS, Options
from styleloom.weights.merge.objective import MaskVector
from styleloom.weights.merge.priors import layer_prior

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"
TE = "lora_te1_text_model_encoder_layers_3_mlp_fc1"
TARGET = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_{}.weight"


def lora(*stems, rank=3, seed=0, size=(20, 16), alpha=None, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for stem in stems:
        made[f"{stem}.lora_down.weight"] = torch.randn(rank, size[1], generator=generator).to(dtype)
        made[f"{stem}.lora_up.weight"] = (scale * torch.randn(size[0], rank, generator=generator)).to(dtype)
        if alpha is not None:
            made[f"{stem}.alpha"] = torch.tensor(alpha)
    return made


def merge(content, style, strengths=(1.0, 1.0), separation=1.0, max_rank=0):
    loras = [read_lora(content, "content"), read_lora(style, "style")]
    align(loras, None)
    check_sizes(loras, None)
    prepared = prepare(*loras, strengths)
    masks = solve_fast(prepared, layer_prior("none", "sdxl")[0], separation, True)
    return assemble(prepared, masks, max_rank), prepared, loras


def dense(tensors, stem):
    alpha = tensors.get(f"{stem}.alpha")
    down, up = tensors[f"{stem}.lora_down.weight"].float(), tensors[f"{stem}.lora_up.weight"].float()
    return up @ down * (1.0 if alpha is None else float(alpha) / down.shape[0])


def product(adapter):
    return adapter.up @ adapter.down


def test_one_sided_layers_pass_through_at_full_strength():
    content, style = lora(Q, K, TE, alpha=1.5), lora(Q, rank=5, seed=1)
    merged, prepared, _ = merge(content, style, (0.5, 1.0))
    assert len(prepared.targets) == 1 and len(merged.adapters) == 3
    assert torch.allclose(product(merged.adapters[TARGET.format("k")]), 0.5 * dense(content, K), atol=1e-5)
    te = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    assert torch.allclose(product(merged.adapters[te]), 0.5 * dense(content, TE), atol=1e-5)
    assert merged.reports[te].kept == (1.0, None)


@pytest.mark.parametrize(("content", "style"), [(1, 512), (512, 1), (128, 4)])
def test_ranks_at_both_ends(content, style):
    merged, _, _ = merge(lora(Q, rank=content), lora(Q, rank=style, seed=1), separation=0.0)
    due = dense(lora(Q, rank=content), Q) + dense(lora(Q, rank=style, seed=1), Q)
    found = product(merged.adapters[TARGET.format("q")])
    assert (found - due).norm() < 2e-3 * due.norm()


def test_untrained_layers_and_strength_zero_count_as_not_there():
    zero = lora(Q, seed=1, scale=0.0)
    for style, strength in ((zero, 1.0), (lora(Q, seed=1), 0.0)):
        merged, prepared, _ = merge(lora(Q), style, (1.0, strength))
        assert not prepared.targets
        assert torch.allclose(product(merged.adapters[TARGET.format("q")]), dense(lora(Q), Q), atol=1e-5)


def test_nothing_at_all_is_refused_when_written():
    merged, _, loras = merge(lora(Q, scale=0.0), lora(Q, seed=1, scale=0.0))
    with pytest.raises(StyleLoomError, match="every change in it is zero"):
        write_lora(merged.adapters, {}, loras, "sdxl", None, {})


def test_a_shared_random_start_is_told():
    content, style = lora(Q), lora(Q, seed=1)
    style[f"{Q}.lora_down.weight"] = content[f"{Q}.lora_down.weight"] + 0.01 * torch.randn(3, 16)
    merged, _, _ = merge(content, style)
    assert "same random start" in merged.warnings[0]
    assert not merge(lora(Q), lora(Q, seed=1))[0].warnings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_smaller_precisions(dtype):
    content, style = lora(Q, dtype=dtype), lora(Q, seed=1, dtype=dtype)
    merged, _, loras = merge(content, style, separation=0.0)
    written = write_lora(merged.adapters, {}, loras, "sdxl", None, {})
    due = dense(content, Q) + dense(style, Q)
    assert (dense(written, Q) - due).norm() < (2e-3 if dtype == torch.float16 else 1.5e-2) * due.norm()


@pytest.mark.parametrize(("content", "style", "words"), [
    (lora(Q), lora(Q, size=(20, 17)), "two different models"),
    (lora(Q), lora("lora_unet_double_blocks_0_img_attn_qkv"), "seem to be for different models"),
    (lora("transformer.a.b"), lora("transformer.c.d"), "connect model"),
    (lora(Q), {}, "style is empty"),
    (lora(Q), {"model.diffusion_model.out.2.weight": torch.ones(2, 2)}, "style: this is no LoRA"),
    (lora(Q), {k: v * float("nan") for k, v in lora(Q).items()}, "style: .* holds NaN"),
])
def test_what_is_refused(content, style, words):
    with pytest.raises(StyleLoomError, match=words):
        merge(content, style)


def test_fp16_that_overflows_is_refused():
    merged, _, loras = merge(lora(Q, dtype=torch.float16), lora(Q, seed=1, dtype=torch.float16), (1e9, 1e9), 0.0)
    with pytest.raises(StyleLoomError, match="too large for fp16"):
        write_lora(merged.adapters, {}, loras, "sdxl", None, {})


def test_max_rank_limits_every_layer():
    merged, _, _ = merge(lora(Q, K, rank=6), lora(Q, rank=6, seed=1), max_rank=4)
    assert {adapter.rank for adapter in merged.adapters.values()} == {4}
    assert {report.rank for report in merged.reports.values()} == {4}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_one_sided_layers_through(method):
    loras = [read_lora(lora(Q, K), "a"), read_lora(lora(Q, seed=1), "b")]
    merged = merge_many(loras, [0.5, 1.0], method, Options())
    assert torch.allclose(product(merged.adapters[TARGET.format("k")]), 0.5 * dense(lora(Q, K), K), atol=1e-4)
    assert set(merged.reports) == set(merged.adapters)


def test_differences_that_cannot_be_added():
    key = "lora_unet_input_blocks_4_1_norm.set_weight"
    a, b = (read_lora({**lora(Q), key: torch.full((4,), value)}, "x") for value in (1.0, 2.0))
    with pytest.raises(StyleLoomError, match="set .* to different values"):
        pass_other([a, b], [1.0, 1.0], [])
    assert len(pass_other([a, a], [1.0, 1.0], [])) == 1


def test_a_slice_needs_the_model():
    key_map = {"transformer.q": ("qkv.weight", (0, 0, 4)), "qkv": "qkv.weight"}
    loras = [read_lora(lora("transformer.q", size=(4, 16)), "a", key_map),
             read_lora(lora("qkv", size=(12, 16), seed=1), "b", key_map)]
    with pytest.raises(StyleLoomError, match="Connect model"):
        align(loras, None)
    align(loras, lambda key: (12, 16))
    assert set(loras[0].adapters) == {"qkv.weight"}
    whole = product(loras[0].adapters["qkv.weight"])
    assert torch.equal(whole[:4], dense(lora("transformer.q", size=(4, 16)), "transformer.q"))
    assert not whole[4:].any()


@pytest.mark.parametrize("separation", [0.0, 0.6, 1.0])
def test_calibration_without_measurements_is_the_masks_alone(separation):
    """At equal ranks, as calibration gives both Grams the trace 1."""
    _, prepared, _ = merge(lora(Q, K, rank=4), lora(Q, K, rank=4, seed=1))
    prior = layer_prior("none", "sdxl")[0]
    start = solve_fast(prepared, prior, 1.0, False, limit=1.0)
    nothing = [(None, None)] * len(prepared.targets)
    found = solve_calibrated(prepared, nothing, prior, separation, True, start)
    due = solve_fast(prepared, prior, separation, True, limit=1.0)
    assert torch.allclose(found.content, due.content, atol=1e-3) and torch.allclose(found.style, due.style, atol=1e-3)


def test_masks_as_one_vector_and_back():
    _, prepared, _ = merge(lora(Q, K, rank=4), lora(Q, K, rank=3, seed=1))
    masks = solve_fast(prepared, layer_prior("soft", "sdxl")[0], 0.7, True, limit=1.0)
    vector = MaskVector(prepared, masks)
    again = vector.masks(vector.start, masks)
    assert torch.allclose(again.content, masks.content, atol=1e-6) and torch.allclose(again.style, masks.style, atol=1e-6)
    m, shares = prepared.moments, vector.shares(vector.start)
    for i in range(2):
        due = float((masks.content[i] * m.alpha[i].sqrt()).sum() / m.alpha[i].sqrt().sum())
        assert abs(float(shares[i, 0]) - due) < 1e-5
