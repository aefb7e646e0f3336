"""Two whole LoRAs: what is shared, what passes through, what is refused."""

from __future__ import annotations

import pytest
import torch
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.lora.reading import read_lora
from styleloom.weights.lora.writing import write_lora
from styleloom.weights.merge.calibrated import solve_calibrated
from styleloom.weights.merge.alignment import align, check_sizes
from styleloom.weights.merge.fast import merge_fast
from styleloom.weights.merge.several_loras import merge_many
from styleloom.weights.merge.methods import METHODS, Options
from styleloom.weights.merge.objective import MaskVector
from styleloom.weights.merge.other_parts import folded_line, pass_other
from styleloom.weights.merge.priors import layer_prior
from styleloom.weights.merge.report import result_lines
from styleloom.weights.merge.two_loras import assemble, prepare, solve_prepared

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


def read(*tensors, key_map=None):
    loras = [read_lora(lora, name, key_map) for lora, name in zip(tensors, ("content", "style", "third"))]
    align(loras, None)
    check_sizes(loras, None)
    return loras


def merge(content, style, strengths=(1.0, 1.0), separation=1.0, max_rank=0, prior="none", dtype=None):
    loras = read(content, style)
    prior = layer_prior(prior, "sdxl")[0]
    return merge_fast(*loras, strengths, prior, separation, True, max_rank, dtype), loras


def dense(tensors, stem):
    alpha = tensors.get(f"{stem}.alpha")
    down, up = tensors[f"{stem}.lora_down.weight"].float(), tensors[f"{stem}.lora_up.weight"].float()
    return up @ down * (1.0 if alpha is None else float(alpha) / down.shape[0])


def product(adapter):
    down, up = adapter.factors()
    return up @ down


def test_one_sided_layers_pass_through_at_full_strength():
    content, style = lora(Q, K, TE, alpha=1.5), lora(Q, rank=5, seed=1)
    merged, _ = merge(content, style, (0.5, 1.0))
    assert sum(r.overlap is not None for r in merged.reports.values()) == 1 and len(merged.adapters) == 3
    assert torch.allclose(product(merged.adapters[TARGET.format("k")]), 0.5 * dense(content, K), atol=1e-5)
    te = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.weight"
    assert torch.allclose(product(merged.adapters[te]), 0.5 * dense(content, TE), atol=1e-5)
    assert merged.reports[te].kept == (1.0, None)


@pytest.mark.parametrize(("content", "style"), [(1, 512), (512, 1), (128, 4)])
def test_ranks_at_both_ends(content, style):
    merged, _ = merge(lora(Q, rank=content), lora(Q, rank=style, seed=1), separation=0.0)
    due = dense(lora(Q, rank=content), Q) + dense(lora(Q, rank=style, seed=1), Q)
    found = product(merged.adapters[TARGET.format("q")])
    assert (found - due).norm() < 2e-3 * due.norm()


def test_untrained_layers_and_strength_zero_count_as_not_there():
    zero = lora(Q, seed=1, scale=0.0)
    for style, strength in ((zero, 1.0), (lora(Q, seed=1), 0.0)):
        merged, _ = merge(lora(Q), style, (1.0, strength))
        assert merged.notes == ["style: 1 layers change nothing (untrained, or strength 0)"]
        assert torch.allclose(product(merged.adapters[TARGET.format("q")]), dense(lora(Q), Q), atol=1e-5)


def test_nothing_at_all_is_refused_when_written():
    merged, loras = merge(lora(Q, scale=0.0), lora(Q, seed=1, scale=0.0))
    with pytest.raises(StyleLoomError, match="every change in it is zero"):
        write_lora(merged.adapters, {}, loras, "sdxl", None, {})


def test_a_shared_random_start_is_told():
    content, style = lora(Q), lora(Q, seed=1)
    style[f"{Q}.lora_down.weight"] = content[f"{Q}.lora_down.weight"] + 0.01 * torch.randn(3, 16)
    merged, _ = merge(content, style)
    assert "same random start" in merged.warnings[0]
    assert not merge(lora(Q), lora(Q, seed=1))[0].warnings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_smaller_precisions(dtype):
    content, style = lora(Q, dtype=dtype), lora(Q, seed=1, dtype=dtype)
    merged, loras = merge(content, style, separation=0.0)
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
    merged, loras = merge(lora(Q, dtype=torch.float16), lora(Q, seed=1, dtype=torch.float16), (1e9, 1e9), 0.0)
    with pytest.raises(StyleLoomError, match="too large for fp16"):
        write_lora(merged.adapters, {}, loras, "sdxl", None, {})


def test_max_rank_limits_every_layer():
    merged, _ = merge(lora(Q, K, rank=6), lora(Q, rank=6, seed=1), max_rank=4)
    assert {adapter.rank for adapter in merged.adapters.values()} == {4}
    assert {report.rank for report in merged.reports.values()} == {4}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_one_sided_layers_through(method):
    """With average as the rest of it: over the number of LoRAs."""
    loras = read(lora(Q, K), lora(Q, seed=1), lora(Q, seed=2))
    merged = merge_many(loras, [0.5, 1.0, 0.0], method, Options())
    factor = 0.25 if method == "average" else 0.5
    due = factor * dense(lora(Q, K), K)
    assert torch.allclose(product(merged.adapters[TARGET.format("k")]), due, atol=1e-4)
    report = merged.reports[TARGET.format("k")]
    assert report.kept == (factor / 0.5, None, None) and abs(report.size - float(due.norm())) < 1e-4
    assert set(merged.reports) == set(merged.adapters)


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_every_merge_beside_the_plain_sum(method):
    tensors = lora(Q, rank=4), lora(Q, rank=4, seed=1)
    loras = read(*tensors)
    merged = merge_many(loras, [1.0, 1.0], method, Options(), max_rank=3, dtype=torch.float64)
    found = product(merged.adapters[TARGET.format("q")]).norm() / sum(dense(t, Q) for t in tensors).norm()
    assert f"size of the change: {float(found):.2f} times" in result_lines(loras, merged)[-1]
    cuts = [line for line in result_lines(loras, merged) if line.startswith("energy that the limit")]
    assert len(cuts) == 1


@pytest.mark.parametrize(("max_rank", "separation"), [(0, 0.0), (0, 0.8), (2, 0.8)])
def test_the_figures_of_a_ziprank_merge_are_those_of_its_dense_matrices(max_rank, separation):
    tensors = lora(Q, rank=4), lora(Q, rank=5, seed=1)
    whole, _ = merge(*tensors, separation=separation)
    merged, _ = merge(*tensors, separation=separation, max_rank=max_rank)
    (report,), (adapter,) = merged.reports.values(), merged.adapters.values()
    one, two = (dense(t, Q).double() for t in tensors)
    found, full = product(adapter).double(), product(next(iter(whole.adapters.values()))).double()
    assert abs(report.size - float(found.norm())) < 1e-5 * float(found.norm())
    assert abs(report.sum_size - float((one + two).norm())) < 1e-5 * float((one + two).norm())
    assert abs(report.energy - float(found.square().sum() / full.square().sum())) < 1e-5
    losses = []
    for kept, own in zip(report.kept, (one, two)):
        _, s, vh = torch.linalg.svd(own, full_matrices=False)
        rows = vh[s > 1e-6 * s[0]]
        on_own = found @ rows.T @ rows
        assert abs(kept - float((on_own * own).sum() / own.square().sum())) < 1e-5
        losses.append(float((on_own - own).square().sum() / own.square().sum()))
    assert abs(report.loss - sum(losses) / 2) < 1e-5


def test_a_change_that_is_much_larger_than_the_plain_sum_is_told():
    """Two LoRAs that nearly cancel: what stays of each alone is many times their sum."""
    content, style = lora(Q), lora(Q)
    style[f"{Q}.lora_up.weight"] = -0.8 * style[f"{Q}.lora_up.weight"]
    loras = read(content, style)
    merged = merge_many(loras, [1.0, 1.0], "TIES", Options())
    lines = result_lines(loras, merged)
    assert lines[-1].startswith("size of the change: ") and "times as large as the plain sum" in merged.warnings[0]
    merged = merge_many(loras, [1.0, 1.0], "sum", Options())
    assert "1.00 times" in result_lines(loras, merged)[-1] and not merged.warnings


B = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"  # b-lora: for the style alone


@pytest.mark.parametrize("separation", [0.0, 0.7, 1.0])
def test_a_prior_of_zero_leaves_a_lora_out_whatever_the_separation(separation):
    content = lora(B, Q, seed=3) | {f"{B}.diff_b": torch.ones(20)}
    only_content = B.replace("to_q", "to_v")
    content |= lora(only_content, seed=4)
    style = lora(B, Q, seed=5)
    merged, loras = merge(content, style, separation=separation, prior="b-lora")
    target = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_{}.weight"
    assert torch.allclose(product(merged.adapters[target.format("q")]), dense(style, B), atol=1e-4)
    assert target.format("v") not in merged.adapters and TARGET.format("q") in merged.adapters
    prior = layer_prior("b-lora", "sdxl")[0]
    assert not pass_other(loras, [1.0, 1.0], [], lambda index, target: prior(target)[index] == 0)
    prepared = prepare(*loras, (1.0, 1.0), prior)
    masks = solve_prepared(prepared, separation, True)
    again = assemble(prepared, masks)
    assert torch.allclose(product(again.adapters[target.format("q")]), dense(style, B), atol=1e-4)
    assert set(again.adapters) == set(merged.adapters)
    vector = MaskVector(prepared, masks)
    trained = vector.masks(vector.start + 0.3, masks)  # what training makes of them
    assert [bool(trained.content[i].any()) for i, t in enumerate(prepared.targets) if "output" in t] == [False]


def test_differences_that_cannot_be_added():
    key = "lora_unet_input_blocks_4_1_norm.set_weight"
    a, b = (read_lora({**lora(Q), key: torch.full((4,), value)}, "x") for value in (1.0, 2.0))
    with pytest.raises(StyleLoomError, match="set .* to different values"):
        pass_other([a, b], [1.0, 1.0], [])
    assert len(pass_other([a, a], [1.0, 1.0], [])) == 1
    assert not pass_other([a, b], [0.0, 0.0], []), "a strength of 0 leaves a LoRA out"
    set_q = read_lora({f"{Q}.set_weight": torch.zeros(20, 16)}, "y")
    with pytest.raises(StyleLoomError, match="replaced by one LoRA"):
        write_lora(a.adapters, pass_other([set_q], [1.0], []), [a, set_q], "sdxl", None, {})


def test_two_spellings_of_a_difference_become_one():
    norm = "lora_unet_input_blocks_4_1_norm"
    a = read_lora({f"{norm}.w_norm": torch.ones(4), f"{norm}.b_norm": 2 * torch.ones(4)}, "a")
    b = read_lora({f"{norm}.diff": torch.ones(4), f"{norm}.diff_b": torch.ones(4)}, "b")
    for order in ([a, b], [b, a]):
        found = write_lora({}, pass_other(order, [1.0, 1.0], []), order, "sdxl", None, {})
        assert {key.split(".")[1]: float(value[0]) for key, value in found.items()} == {"diff": 2, "diff_b": 3}


def test_a_low_rank_change_and_a_full_difference_become_one():
    full = {f"{Q}.diff": 0.1 * torch.ones(20, 16)}
    loras = read(lora(Q, alpha=1.5), full | lora(K, seed=1))
    merged = merge_many(loras, [0.5, 2.0], "sum", Options())
    notes: list[str] = []
    other = pass_other(loras, [0.5, 2.0], notes)
    notes += folded_line(merged.adapters, other)
    written = write_lora(merged.adapters, other, loras, "sdxl", None, {})
    assert {key for key in written if key.startswith(Q)} == {f"{Q}.diff"}
    due = 0.5 * dense(lora(Q, alpha=1.5), Q) + 2 * full[f"{Q}.diff"]
    assert torch.allclose(written[f"{Q}.diff"], due, atol=1e-5) and "1 layers have a low-rank change" in notes[-1]


def swap(weight):
    one, two = weight.chunk(2, dim=0)
    return torch.cat([two, one], dim=0)


def test_a_target_whose_halves_are_swapped_meets_the_same_weight_in_its_own_order():
    key_map = {"transformer.norm_out.linear": ("final.weight", None, swap), "final": "final.weight"}
    one, two = "transformer.norm_out.linear", "final"
    tensors = lora(one) | {f"{one}.diff": torch.arange(320.0).view(20, 16)}, lora(two, seed=1)
    loras = read(*tensors, key_map=key_map)
    due = swap(dense(lora(one), one)) + dense(lora(two, seed=1), two)
    merged = merge_many(loras, [1.0, 1.0], "sum", Options())
    assert torch.allclose(product(merged.adapters["final.weight"]), due, atol=1e-5)
    assert torch.equal(loras[0].other["final.weight", "diff"], swap(torch.arange(320.0).view(20, 16)))
    fast = merge_fast(*loras, (1.0, 1.0), layer_prior("none", "")[0], 0.0, True)
    assert torch.allclose(product(fast.adapters["final.weight"]), due, atol=1e-4)
    strange = {one: ("final.weight", None, lambda weight: 2 * weight)}
    with pytest.raises(StyleLoomError, match="form that this pack does not know"):
        read(lora(one), lora(one), key_map=strange)


CONV = "lora_unet_input_blocks_1_0_in_layers_2"


def loha_conv(seed=0):
    """As LyCORIS writes a convolution without a Tucker core: the kernel is in the columns."""
    r = torch.randn(68, 2, generator=torch.Generator().manual_seed(seed))
    ends = {"hada_w1_a": r[:8], "hada_w1_b": r[8:44].T, "hada_w2_a": r[44:52], "hada_w2_b": r[16:52].T}
    return {f"{CONV}.{end}": value.contiguous() for end, value in ends.items()}


def locon(seed=0, kernel=(3, 3)):
    g = torch.Generator().manual_seed(seed)
    return {f"{CONV}.lora_down.weight": torch.randn(2, 36 // (kernel[0] * kernel[1]), *kernel, generator=g),
            f"{CONV}.lora_up.weight": torch.randn(8, 2, 1, 1, generator=g)}


def test_the_kernel_comes_from_the_lora_that_knows_it_or_from_the_model():
    target = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    for tensors in ((loha_conv(), locon()), (locon(), loha_conv())):
        loras = read(*tensors)
        prior = layer_prior("none", "sdxl")[0]
        assert prepare(*loras, (1.0, 1.0), prior).kernels == [(3, 3)]
        assert merge_fast(*loras, (1.0, 1.0), prior, 0.7, True).adapters[target].kernel == (3, 3)
        assert merge_many(loras, [1.0, 1.0], "sum", Options()).adapters[target].kernel == (3, 3)
    names = {CONV: "conv.weight"}
    shapes = [read_lora(loha_conv(seed), "x", names, lambda key: (8, 4, 3, 3)) for seed in (1, 2)]
    assert prepare(*shapes, (1.0, 1.0)).kernels == [(3, 3)]
    unknown = [read_lora(part, "x", {CONV: "conv.weight"}) for part in (loha_conv(), locon())]
    assert prepare(*unknown, (1.0, 1.0)).kernels == [(3, 3)]
    with pytest.raises(StyleLoomError, match=r"kernels \[1, 9\] and \[3, 3\]"):
        read(locon(), locon(kernel=(1, 9)), key_map={CONV: "conv.weight"})


def test_sizes_are_compared_between_all_loras():
    with pytest.raises(StyleLoomError, match="in style and .* in third"):
        read(lora(K), lora(Q, K), lora(Q, size=(20, 17)))


def test_a_slice_needs_the_model():
    key_map = {"transformer.q": ("qkv.weight", (0, 0, 4)), "qkv": "qkv.weight"}
    tensors = lora("transformer.q", size=(4, 16), alpha=6.0), lora("qkv", size=(12, 16), seed=1)
    loras = [read_lora(t, name, key_map) for t, name in zip(tensors, "ab")]
    with pytest.raises(StyleLoomError, match="Connect model"):
        align(loras, None)
    align(loras, lambda key: (12, 16))
    assert set(loras[0].adapters) == {"qkv.weight"}
    whole = product(loras[0].adapters["qkv.weight"])
    assert torch.allclose(whole[:4], dense(tensors[0], "transformer.q"))
    assert not whole[4:].any()


@pytest.mark.parametrize("separation", [0.0, 0.6, 1.0])
def test_calibration_without_measurements_is_the_masks_alone(separation):
    """At equal ranks, as calibration gives both Grams the trace 1."""
    prior = layer_prior("none", "sdxl")[0]
    prepared = prepare(*read(lora(Q, K, rank=4), lora(Q, K, rank=4, seed=1)), (1.0, 1.0), prior)
    start = solve_prepared(prepared, 1.0, False)
    nothing = [(None, None)] * len(prepared.targets)
    found = solve_calibrated(prepared, nothing, separation, True, start)
    due = solve_prepared(prepared, separation, True)
    assert torch.allclose(found.content, due.content, atol=1e-3) and torch.allclose(found.style, due.style, atol=1e-3)


def test_masks_as_one_vector_and_back():
    loras = read(lora(Q, K, rank=4), lora(Q, K, rank=3, seed=1))
    prepared = prepare(*loras, (1.0, 1.0), layer_prior("soft", "sdxl")[0])
    masks = solve_prepared(prepared, 0.7, True)
    vector = MaskVector(prepared, masks)
    again = vector.masks(vector.start, masks)
    assert torch.allclose(again.content, masks.content, atol=1e-6) and torch.allclose(again.style, masks.style, atol=1e-6)
    m, shares = prepared.moments, vector.shares(vector.start)
    for i in range(2):
        due = float((masks.content[i] * m.alpha[i].sqrt()).sum() / m.alpha[i].sqrt().sum())
        assert abs(float(shares[i, 0]) - due) < 1e-5


def test_what_is_prepared_for_the_model():
    """Layers of both LoRAs in the gauge; one that only one has as it is, with its strength, and whose it is."""
    content, style = lora("down_blocks_1", "mid_block_1", seed=1), lora("down_blocks_1", "up_blocks_1", seed=2)
    prepared = prepare(*read(content, style), (0.5, 2.0))
    (shared,) = prepared.targets
    assert "down_blocks_1" in str(shared)
    assert {str(target).split(":")[-1]: index for target, (index, _) in prepared.one_sided.items()} == {
        "mid_block_1": 0, "up_blocks_1": 1
    }  # fmt: skip
    for target, (index, change) in prepared.one_sided.items():
        stem, tensors = str(target).split(":")[-1], (content, style)[index]
        due = dense(tensors, next(key.split(".")[0] for key in tensors if stem in key)) * (0.5, 2.0)[index]
        torch.testing.assert_close(product(change).to(due.dtype), due)
