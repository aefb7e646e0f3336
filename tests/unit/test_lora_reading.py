"""LoRA files of every trainer's spelling in one canonical form, and back into names that everybody reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from styleloom.weights.errors import StyleLoomError
from styleloom.weights.lora.keys import key_part
from styleloom.weights.lora.reading import read_lora
from styleloom.weights.lora.sdxl_names import sdxl_key_map
from styleloom.weights.lora.writing import write_lora
from styleloom.weights.unet.architecture import SDXL

OWN = {name: layer.diffusers for name, layer in SDXL.weights.items() if "attn" in name or "ff.net" in name}
TARGET = "diffusion_model.{}.weight"


def pair(seed: int = 0, rank: int = 2, inner: int = 6, out: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator)


# How trainers write the layer that is `own` in the checkpoint and `other` in diffusers: (stem, end of down, end of up).
SPELLINGS = {
    "kohya": lambda own, other: ("lora_unet_" + own.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    "kohya, diffusers' blocks": lambda own, other: (
        "lora_unet_" + other.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    "diffusers": lambda own, other: (f"unet.{other}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers 0.2x": lambda own, other: (f"unet.{other}", ".lora.down.weight", ".lora.up.weight"),
    "diffusers, old": lambda own, other: (
        f"unet.{other}".replace(".to_", ".processor.to_").removesuffix(".0") if "attn" in other else f"unet.{other}",
        "_lora.down.weight", "_lora.up.weight"),
    "PEFT": lambda own, other: (f"base_model.model.{other}", ".lora_A.weight", ".lora_B.weight"),
    "PEFT, named": lambda own, other: (
        f"base_model.model.{other}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT in unet": lambda own, other: (f"unet.base_model.model.{other}", ".lora_A.weight", ".lora_B.weight"),
    "doubled": lambda own, other: (f"unet.unet.{other}", ".lora.down.weight", ".lora.up.weight"),
    "LyCORIS": lambda own, other: ("lycoris_" + other.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    "checkpoint": lambda own, other: (f"diffusion_model.{own}", ".lora_A.weight", ".lora_B.weight"),
    "bare": lambda own, other: (other, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


def test_the_built_in_map_has_all_attention_and_feed_forward_layers():
    assert len(OWN) == 700 and len(set(OWN.values())) == 700
    assert sum("attn" in name for name in OWN) == 560


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_every_layer(spelling):
    lora = {}
    for own, other in OWN.items():
        stem, down, up = SPELLINGS[spelling](own, other)
        lora[stem + down], lora[stem + up] = pair()
    found = read_lora(lora, "x")
    assert found.family == "sdxl" and not found.unknown
    assert set(found.adapters) == {TARGET.format(own) for own in OWN}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(OWN)), st.sampled_from(sorted(SPELLINGS)), st.integers(1, 9)),
                min_size=1, max_size=12, unique_by=lambda row: row[0]), st.sampled_from([None, 1.0, 16.0]))
def test_any_mixture_in_one_file(rows, alpha):
    lora, due = {}, {}
    for i, (own, spelling, rank) in enumerate(rows):
        stem, down, up = SPELLINGS[spelling](own, OWN[own])
        a, b = pair(i, rank)
        lora[stem + down], lora[stem + up] = a, b
        if alpha is not None:
            lora[stem + ".alpha"] = torch.tensor(alpha)
        due[TARGET.format(own)] = b @ a * (1 if alpha is None else alpha / rank)
    found = read_lora(lora, "x")
    assert set(found.adapters) == set(due)
    for target, adapter in found.adapters.items():
        down, up = adapter.factors()
        assert torch.allclose(up @ down, due[target], atol=1e-5)
    written = write_lora(found.adapters, {}, [found], "sdxl", None, {})
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in written)
    again = read_lora(written, "y")
    for target, adapter in again.adapters.items():
        down, up = adapter.factors()
        assert torch.allclose(up @ down, due[target], atol=1e-5)
        assert float(written[f"lora_unet_{target[16:-7].replace('.', '_')}.alpha"]) == adapter.rank


@pytest.mark.parametrize("stem", [
    "lora_te1_text_model_encoder_layers_3_self_attn_q_proj", "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
    "text_encoder.base_model.model.text_model.encoder.layers.3.self_attn.q_proj",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj"])
def test_text_encoders(stem):
    a, b = pair()
    found = read_lora({f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}, "x", sdxl_key_map())
    (target,) = found.adapters
    assert target == "clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj.weight"
    assert set(write_lora(found.adapters, {}, [found], "sdxl", None, {})) == {
        f"lora_te1_text_model_encoder_layers_3_self_attn_q_proj.{end}"
        for end in ("lora_down.weight", "lora_up.weight", "alpha")}


def test_other_models_without_a_map_keep_their_names():
    a, b = pair()
    one = read_lora({"transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight": a,
                     "transformer.single_transformer_blocks.3.attn.to_q.lora_B.weight": b}, "x")
    two = read_lora({"lora_unet_single_transformer_blocks_3_attn_to_q.lora_down.weight": a,
                     "lora_unet_single_transformer_blocks_3_attn_to_q.lora_up.weight": b}, "y")
    assert one.family == two.family == "" and set(one.adapters) == set(two.adapters)
    assert set(write_lora(one.adapters, {}, [one, two], "", None, {})) == {
        f"transformer.single_transformer_blocks.3.attn.to_q.lora_{side}.weight" for side in "AB"}


def test_a_convolution_is_written_as_one():
    own = "input_blocks.4.0.in_layers.2"
    lora = {f"lora_unet_{own.replace('.', '_')}.lora_down.weight": torch.randn(2, 4, 3, 3),
            f"lora_unet_{own.replace('.', '_')}.lora_up.weight": torch.randn(5, 2, 1, 1)}
    found = read_lora(lora, "x", sdxl_key_map())
    written = write_lora(found.adapters, {}, [found], "sdxl", None, {})
    assert [tuple(t.shape) for t in written.values()] == [(2, 4, 3, 3), (5, 2, 1, 1), ()]


@pytest.mark.parametrize(("dtypes", "written"), [
    ((torch.float16, torch.float16), torch.float16), ((torch.float16, torch.float32), torch.float32),
    ((torch.bfloat16, torch.float8_e4m3fn), torch.bfloat16), ((torch.float8_e4m3fn,) * 2, torch.bfloat16)])
def test_the_written_precision_is_the_wider_one(dtypes, written):
    sources = []
    for dtype in dtypes:
        a, b = (t.to(dtype) for t in pair())
        sources.append(read_lora({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": a,
                                  "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": b}, "x"))
    made = write_lora(sources[0].adapters, {}, sources, "sdxl", None, {})
    assert {tensor.dtype for key, tensor in made.items() if not key.endswith("alpha")} == {written}


def test_with_a_map_what_is_not_in_it_is_reported():
    a, b = pair()
    lora = {"diffusion_model.a.lora_A.weight": a, "diffusion_model.a.lora_B.weight": b,
            "diffusion_model.zz.lora_A.weight": a, "diffusion_model.zz.lora_B.weight": b}
    found = read_lora(lora, "x", {"diffusion_model.a": "diffusion_model.a.weight"})
    assert list(found.adapters) == ["diffusion_model.a.weight"]
    assert found.unknown == ["diffusion_model.zz.lora_A.weight", "diffusion_model.zz.lora_B.weight"]
    with pytest.raises(StyleLoomError, match="none of the 2 layers of x is in the model"):
        read_lora(lora, "x", {"other": "other.weight"})


@pytest.mark.parametrize(("lora", "words"), [
    ({}, "x is empty"),
    ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2), "first_stage_model.a": torch.ones(2)},
     "this is no LoRA"),
    ({"a.oft_blocks": torch.ones(2, 2, 2)}, "OFT"),
    ({"a.a1.weight": torch.ones(2, 2), "a.a2.weight": torch.ones(2, 2)}, "GLoRA"),
    ({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2), "a.dora_scale": torch.ones(3, 1)},
     "DoRA"),
    ({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2), "a.lora_A.two.weight": torch.ones(2, 3)},
     "same part of one adapter"),
    ({"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2),
      "lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.lora_up.weight": torch.ones(3, 2)},
     "for the same weight"),
])
def test_what_is_refused(lora, words):
    with pytest.raises(StyleLoomError, match=words):
        read_lora(lora, "x")


@pytest.mark.parametrize(("key", "found"), [
    ("a.b.lora_A.default.weight", ("a.b", "down")), ("a.lora_B", ("a", "up")), ("a.lora_B.bias", ("a", "diff_b")),
    ("a_lora.down.weight", ("a", "down")), ("a.hada_t2", ("a", "hada_t2")), ("a.lokr_w2_b", ("a", "lokr_w2_b")),
    ("a.lora_magnitude_vector.default.weight", ("a", "dora")), ("a.diff", ("a", "diff")), ("a.weight", None),
    (".alpha", None)])
def test_keys(key, found):
    assert key_part(key) == found


def test_a_lokr_that_the_host_has_cut_from_a_fused_layer():
    """Read as a whole adapter it would be another change, of another size."""
    lora = {"q.lokr_w1": torch.ones(6, 2), "q.lokr_w2": torch.ones(4, 4), "q.row_offset": torch.tensor(8)}
    with pytest.raises(StyleLoomError, match=r"1 LoKr are cut from a fused layer.*: q\.row_offset"):
        read_lora(lora, "x")
