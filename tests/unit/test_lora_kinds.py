"""What everything that handles LoRAs says of the same keys and parts: reading, Block Filter, the file check, the pairs
of a bias LoRA, writing. All of them ask the table of kinds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.lora.block_filter import filter_blocks
from styleloom.weights.lora.files import check_lora, save_lora
from styleloom.weights.lora.lora_model import split_pairs
from styleloom.weights.lora.low_rank import LowRank
from styleloom.weights.lora.names import find_target
from styleloom.weights.lora.reading import read_lora
from styleloom.weights.lora.writing import write_lora

LAYER = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_input_blocks_4_0_in_layers_2"
EVERYWHERE = {"preset": "custom patterns", "patterns": "*"}


def product(change) -> torch.Tensor:
    """What a `LowRank` stands for."""
    down, up = change.factors()
    return up @ down


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "PEFT": (".lora_A.weight", ".lora_B.weight"),
    "PEFT, default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT, another name": (".lora_A.style.weight", ".lora_B.style.weight"),
    "Mochi": (".lora_A", ".lora_B"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "diffusers, old": ("_lora.down.weight", "_lora.up.weight"),
    "diffusers, text": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("spelling", PAIRS)
def test_a_pair_is_one_everywhere(spelling):
    (down, up), alpha = PAIRS[spelling], torch.tensor(4.0)
    lora = {LAYER + down: random(0, 2, 6), LAYER + up: random(1, 5, 2), f"{LAYER}.alpha": alpha}
    due = 2 * lora[LAYER + up] @ lora[LAYER + down]
    check_lora(lora, "a.safetensors")
    (adapter,) = read_lora(lora, "x").adapters.values()
    assert torch.allclose(product(adapter), due)
    ((name, pair),), rest = split_pairs(lora)[0].items(), split_pairs(lora)[1]
    assert name == LAYER and rest == [] and torch.allclose(product(pair), due)
    half = filter_blocks(lora, inside=0.5, **EVERYWHERE).lora
    assert half.keys() == lora.keys() and float(half[f"{LAYER}.alpha"]) == 2


REFUSED = {
    "OFT": {"oft_blocks": (2, 3, 3), "alpha": ()},
    "OFT, rescaled": {"oft_blocks": (2, 3, 3), "rescale": (6, 1), "alpha": ()},
    "OFT, of PEFT": {"oft_R.weight": (2, 3)},
    "OFT, of PEFT with a name": {"oft_R.default.weight": (2, 3)},
    "OFT, old": {"oft_diag": (2, 3, 3)},
    "BOFT": {"oft_blocks": (2, 2, 4, 4), "rescale": (8, 1), "alpha": ()},
    "GLoRA": {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (5, 2), "b2.weight": (2, 6)},
    "DoRA": {"lora_A.weight": (2, 6), "lora_B.weight": (5, 2), "dora_scale": (5, 1)},
    "DoRA, of PEFT": {"lora_A.x.weight": (2, 6), "lora_B.x.weight": (5, 2), "lora_magnitude_vector.x.weight": (5,)},
    "DoRA, a LoHa": {"hada_w1_a": (5, 2), "hada_w1_b": (2, 6), "hada_w2_a": (5, 2), "hada_w2_b": (2, 6),
                     "dora_scale": (5, 1)},
    "IA3": {"weight": (6,), "on_input": ()},
    "IA3, of PEFT": {"ia3_l.default.weight": (6, 1)},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_a_lora_and_named(case):
    """One name in every message; kept or left out as a whole by the filter."""
    lora = {f"{LAYER}.{end}": torch.ones(shape) for end, shape in REFUSED[case].items()}
    check_lora(lora, "a.safetensors")
    name = case.partition(",")[0]
    with pytest.raises(StyleLoomError, match=f"x: {LAYER} is an? {name} adapter") as error:
        read_lora(lora, "x")
    assert "cannot be merged" in str(error.value)
    assert filter_blocks(lora, **EVERYWHERE).lora == lora
    assert split_pairs(lora)[0] == {} and set(split_pairs(lora)[1]) == set(lora)
    if name != "GLoRA":
        with pytest.raises(StyleLoomError, match=rf"\({name}\) whose change does not scale"):
            filter_blocks(lora, inside=0.5, **EVERYWHERE)


@pytest.mark.parametrize(("parts", "words"), [
    ({"lora_A.weight": (2, 6), "lora_B.weight": (5, 2), "alpha": (2,)}, r"alpha is \[2\]"),
    ({"lora_A.weight": (2, 6), "lora_B.weight": (5, 2), "lokr_w1": (1, 2), "lokr_w2": (5, 3)},
     "parts of a LoRA and of a LoKr"),
    ({"lora_B.weight": (5, 2)}, "lacks down of a LoRA"),
    ({"dora_scale": (5, 1)}, "its magnitude .* stands alone"),
    ({"rescale": (5, 1)}, "lacks the oft_blocks"),
    ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 6), "hada_w2_a": (5, 2), "hada_w2_b": (2, 6), "hada_t1": (2, 2, 3, 3)},
     "only one half of it has a core"),
    ({"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (5, 2)}, "lacks b2 of a GLoRA"),
])  # fmt: skip
def test_what_is_damaged_is_said(parts, words):
    lora = {f"{LAYER}.{end}": torch.ones(shape) for end, shape in parts.items()}
    with pytest.raises(StyleLoomError, match=words):
        read_lora(lora, "x")
    with pytest.raises(StyleLoomError, match=words):
        filter_blocks(lora, inside=0.5, **EVERYWHERE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_alpha_is_written_as_it_is(dtype, tmp_path):
    """bf16 has 8 bits: of the ranks above 256 it holds every second one."""
    rank = 257 if dtype == torch.bfloat16 else 2049
    down, up = torch.ones(rank, 2, dtype=dtype), torch.ones(2, rank, dtype=dtype)
    lora = {f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up}
    found = read_lora(lora, "x")
    written = write_lora(found.adapters, {}, [found], "sdxl", None, {})
    assert float(written[f"{LAYER}.alpha"]) == rank and written[f"{LAYER}.lora_up.weight"].dtype == dtype
    save_lora(tmp_path / "a.safetensors", written, {}, "bf16" if dtype == torch.bfloat16 else "fp16")
    assert float(load_file(tmp_path / "a.safetensors")[f"{LAYER}.alpha"]) == rank


# --- kernels: LyCORIS writes convolutions without a Tucker core as matrices

WITHOUT_KERNEL = {
    "LoHa": {"hada_w1_a": (4, 2), "hada_w1_b": (2, 54), "hada_w2_a": (4, 2), "hada_w2_b": (2, 54)},
    "LoKr": {"lokr_w1": (2, 3), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 18)},
    "LoRA": {"lora_down.weight": (2, 54), "lora_up.weight": (4, 2)},
}


@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize("kind", WITHOUT_KERNEL)
def test_a_convolution_keeps_its_kernel(kind, model):
    """From the model where there is one, else from the table of SDXL."""
    lora = {f"{CONV}.{end}": random(i, *shape) for i, (end, shape) in enumerate(WITHOUT_KERNEL[kind].items())}
    key = "diffusion_model.input_blocks.4.0.in_layers.2.weight"
    given = ({CONV: key}, {key: (4, 6, 3, 3)}.get) if model else ()
    found = read_lora(lora, "x", *given)
    (adapter,) = found.adapters.values()
    assert adapter.weight_shape == (4, 6, 3, 3)
    written = write_lora(found.adapters, {}, [found], "sdxl", None, {})
    down, up = written[f"{CONV}.lora_down.weight"], written[f"{CONV}.lora_up.weight"]
    assert down.shape == (adapter.rank, 6, 3, 3) and up.shape == (4, adapter.rank, 1, 1)
    t = list(lora.values())
    due = {
        "LoHa": lambda: (t[0] @ t[1]) * (t[2] @ t[3]),
        "LoKr": lambda: torch.kron(t[0], t[1] @ t[2]),
        "LoRA": lambda: t[1] @ t[0],
    }[kind]().reshape(4, 6, 3, 3)
    assert torch.allclose(torch.einsum("or,ri...->oi...", up[..., 0, 0], down), due, atol=1e-9)


@pytest.mark.parametrize(("shape", "words"), [
    ((2, 6, 1, 1), "convolution over 1x1, and .* is one over 3x3"), ((2, 6, 5, 5), "over 5x5, and .* is one over 3x3"),
    ((2, 50), "over one pixel, with 50 columns, and")])
def test_another_kernel_than_the_models(shape, words):
    lora = {f"{CONV}.lora_down.weight": torch.ones(shape), f"{CONV}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(StyleLoomError, match=words):
        read_lora(lora, "x")
    linear = {f"{LAYER}.lora_down.weight": torch.ones(2, 6, 3, 3), f"{LAYER}.lora_up.weight": torch.ones(4, 2, 1, 1)}
    with pytest.raises(StyleLoomError, match="over 3x3, and .* is a linear layer"):
        read_lora(linear, "x")


def test_a_linear_layer_written_as_a_convolution_over_one_pixel():
    lora = {f"{LAYER}.lora_down.weight": torch.ones(2, 6, 1, 1), f"{LAYER}.lora_up.weight": torch.ones(4, 2, 1, 1)}
    (adapter,) = read_lora(lora, "x").adapters.values()
    assert adapter.weight_shape == (4, 6)


# --- what a target may be


def test_a_target_with_swapped_rows():
    """The host names the final modulation of FLUX and SD3 as (key, None, function): all of the weight, rows swapped."""
    swap = lambda rows: rows  # noqa: E731
    key = "diffusion_model.final_layer.adaLN_modulation.1"
    target = (f"{key}.weight", None, swap)
    names = {"transformer.norm_out.linear": target, "lycoris_norm_out_linear": target, key: target[0]}
    stem = "transformer.norm_out.linear"
    lora = {f"{stem}.lora_A.weight": random(0, 2, 6), f"{stem}.lora_B.weight": random(1, 4, 2)}
    lora[f"{stem}.diff_b"] = random(2, 4)
    found = read_lora(lora, "x", names, {target[0]: (4, 6)}.get)
    assert list(found.adapters) == [target] and found.adapters[target].weight_shape == (4, 6)
    assert found.unknown == ["transformer.norm_out.linear.diff_b"] and not found.other  # the host drops it
    written = write_lora(found.adapters, found.other, [found], "", names, {})
    assert set(written) == {f"transformer.norm_out.linear.lora_{side}.weight" for side in "AB"}
    again = read_lora(written, "y", names).adapters[target]
    assert torch.allclose(product(again), product(found.adapters[target]))


def test_a_layer_that_a_control_lora_makes_wider_is_not_merged():
    parts = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(5, 2), "reshape_weight": torch.tensor([5, 8])}
    lora = {f"diffusion_model.img_in.{part}": tensor for part, tensor in parts.items()}
    key = "diffusion_model.img_in.weight"
    names = {"diffusion_model.img_in": key}
    with pytest.raises(StyleLoomError, match=r"img_in enlarges .* from \[5, 4\] to \[5, 8\], as control LoRAs do"):
        read_lora(lora, "x", names, {key: (5, 4)}.get)
    assert (key, "reshape_weight") in read_lora(lora, "x", names, {key: (5, 8)}.get).other


# --- several changes of one weight: under one name the host keeps the last and drops the others


def test_a_pair_and_a_difference_of_one_layer_are_added_up():
    a, b, full = random(0, 2, 6), random(1, 4, 2), random(2, 4, 6)
    lora = {f"{LAYER}.lora_down.weight": a, f"{LAYER}.lora_up.weight": b, f"{LAYER}.diff": full}
    found = read_lora(lora, "x")
    written = write_lora(found.adapters, found.other, [found], "sdxl", None, {})
    assert set(written) == {f"{LAYER}.diff"} and torch.allclose(written[f"{LAYER}.diff"], full + b @ a)


def test_what_else_meets_under_one_name():
    found = read_lora({f"{LAYER}.lora_down.weight": random(0, 2, 6), f"{LAYER}.lora_up.weight": random(1, 4, 2)}, "x")
    (target,) = found.adapters
    one, two = random(2, 4), random(3, 4)
    write = lambda other, adapters=(): write_lora(dict(adapters), other, [found], "sdxl", None, {})  # noqa: E731
    assert torch.allclose(write({(target, "diff"): one, (target, "w_norm"): two})[f"{LAYER}.diff"], one + two)
    assert torch.allclose(write({(target, "diff_b"): one, (target, "b_norm"): two})[f"{LAYER}.diff_b"], one + two)
    assert set(write({(target, "b_norm"): one})) == {f"{LAYER}.diff_b"}  # alone the host does not read it
    assert set(write({(target, "w_norm"): one, (target, "b_norm"): two})) == {f"{LAYER}.w_norm", f"{LAYER}.b_norm"}
    put = {(target, "set_weight"): random(4, 4, 6)}
    for other in (put, put | {(target, "diff"): random(5, 4, 6)}):
        with pytest.raises(StyleLoomError, match="is replaced by one LoRA"):
            write(other, found.adapters.items())
    with pytest.raises(StyleLoomError, match="changes of .* have the shapes"):
        write({(target, "diff"): random(5, 4, 7)}, found.adapters.items())


def test_a_scale_that_is_not_multiplied_in_is_written():
    found = read_lora({f"{LAYER}.lora_down.weight": random(0, 2, 6), f"{LAYER}.lora_up.weight": random(1, 4, 2)}, "x")
    (target, pair), = found.adapters.items()
    made = write_lora({target: LowRank(pair.down, pair.up, scale=0.5)}, {}, [found], "sdxl", None, {})
    assert torch.allclose(made[f"{LAYER}.lora_up.weight"], pair.up / 2)


def test_nothing_is_not_saved(tmp_path):
    with pytest.raises(StyleLoomError, match="the LoRA to save is empty"):
        save_lora(tmp_path / "a.safetensors", {}, {}, "bf16")
    assert not list(tmp_path.iterdir())


def test_a_text_encoders_own_names():
    """Files of a text encoder alone begin with `text_model.`; the key map has them below `text_encoder.`."""
    stem = "text_model.encoder.layers.0.self_attn.q_proj"
    assert find_target(stem, {f"text_encoder.{stem}": "here"}) == "here"
    assert find_target(stem[5:], {f"text_encoder.{stem[5:]}": "here"}) is None
