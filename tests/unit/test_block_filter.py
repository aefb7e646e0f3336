"""LoRA Block Filter: which layers are inside, and that every kind's change has exactly the strength asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.unet.architecture import SD15, SDXL
from styleloom.weights.lora.block_filter import filter_blocks

LDM = {"input": "input_blocks_{}_1", "middle": "middle_block_1", "output": "output_blocks_{}_1"}


def names(architecture, spelling):
    """Block → names of its layers, as trainers spell them."""
    found = {}
    for block, depth, diffusers in architecture.blocks:
        ldm = LDM[block[0]].format(block[1])
        stem = {
            "kohya ldm": f"lora_unet_{ldm}_transformer_blocks_{{}}_attn2_to_k",
            "kohya diffusers": f"lora_unet_{diffusers.replace('.', '_')}_transformer_blocks_{{}}_attn2_to_k",
            "peft": f"unet.{diffusers}.transformer_blocks.{{}}.attn2.to_k",
        }[spelling]  # fmt: skip
        found[block] = [stem.format(i) for i in range(depth)]
    return found


def lora_of(stems, suffixes=(".lora_down.weight", ".lora_up.weight"), alpha=None):
    g = torch.Generator().manual_seed(0)
    made = {}
    for stem in stems:
        made[stem + suffixes[0]] = torch.randn(2, 6, generator=g)
        made[stem + suffixes[1]] = torch.randn(5, 2, generator=g)
        if alpha is not None:
            made[stem + ".alpha"] = torch.tensor(alpha)
    return made


INSIDE = {
    (SDXL, "style blocks"): [("output", 1)],
    (SDXL, "content blocks"): [("output", 0)],
    (SDXL, "layout"): [("input", 8)],
    (SD15, "style blocks"): [("output", 3), ("output", 4), ("output", 5)],
    (SD15, "layout"): [("input", 7), ("input", 8), ("middle", 0)],
}


@pytest.mark.parametrize("spelling", ["kohya ldm", "kohya diffusers", "peft"])
@pytest.mark.parametrize(("architecture", "preset"), INSIDE, ids=lambda v: getattr(v, "name", v))
def test_which_layers(architecture, preset, spelling):
    by_block = names(architecture, spelling)
    resnet = (
        "lora_unet_input_blocks_8_0_in_layers_2" if architecture is SDXL else "lora_unet_down_blocks_2_resnets_0_conv1"
    )
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    lora = lora_of([*sum(by_block.values(), []), resnet, text])
    made = filter_blocks(lora, preset)
    due = {stem for block in INSIDE[architecture, preset] for stem in by_block[block]}
    assert {key.rsplit(".lora", 1)[0] for key in made.lora} == due
    assert all(made.lora[key] is lora[key] for key in made.lora)
    total = len(architecture.layers) + 2
    assert (
        f"inside: {len(due)} of {total} layers at 1" in made.report and "1 of them of the text encoder" in made.report
    )
    rest = filter_blocks(lora, preset, 0.0, 1.0)
    assert {key.rsplit(".lora", 1)[0] for key in rest.lora} == {k.rsplit(".lora", 1)[0] for k in lora} - due


FLUX = {
    "bfl": ("diffusion_model.double_blocks.{}.img_attn.qkv", "diffusion_model.single_blocks.{}.linear2"),
    "kohya": ("lora_unet_double_blocks_{}_txt_mlp_0", "lora_unet_single_blocks_{}_linear1"),
    "diffusers": ("transformer.transformer_blocks.{}.attn.to_q", "transformer.single_transformer_blocks.{}.proj_mlp"),
    "onetrainer": ("lora_transformer_transformer_blocks_{}_ff_net_2",
                   "lora_transformer_single_transformer_blocks_{}_attn_to_k"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "singles"),
    [("content blocks", range(10)), ("style blocks", range(10, 38)),
     ("style blocks without the border", range(12, 38))],
)  # fmt: skip
@pytest.mark.parametrize("spelling", FLUX)
def test_which_blocks_of_flux(spelling, preset, singles):
    """SplitFlux counts the 19 blocks of two streams first: its block 20 is single block 0."""
    double, single = FLUX[spelling]
    other = ["lora_unet_final_layer_linear", "lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    lora = lora_of([double.format(i) for i in range(19)] + [single.format(i) for i in range(38)] + other)
    made = filter_blocks(lora, preset)
    due = lora_of([single.format(i) for i in singles])
    assert made.lora.keys() == due.keys()
    first, last = singles[0] + 20, singles[-1] + 20
    assert f"{preset} of FLUX.1: blocks {first} to {last} of 57" in made.report and "2511.15258" in made.report
    assert ("content leaks into 30 and 31" in made.report) == (preset == "style blocks")


def test_blocks_beyond_those_of_flux_are_of_another_model():
    for stem in ("lora_unet_single_blocks_39_linear1", "diffusion_model.double_blocks.19.img_attn_qkv",
                 "transformer.single_transformer_blocks.7.attn.to_qkv_mlp_proj"):  # fmt: skip
        with pytest.raises(StyleLoomError, match="whose style blocks are known"):
            filter_blocks(lora_of([stem, "lora_unet_single_blocks_12_linear1"]), "style blocks")


def changes(lora, strength=1.0):
    """Stem → the change that the host makes of it, by the formulas of LyCORIS, in float64."""
    t = {key: value.double() for key, value in lora.items()}
    made = {}
    for stem in {key.split(".")[0] for key in t}:
        part = {key[len(stem) + 1 :]: value for key, value in t.items() if key.startswith(stem + ".")}
        alpha = part.get("alpha")
        if "lora_up.weight" in part or "lora_B.weight" in part:
            up, down = (part.get(a, part.get(b)) for a, b in (
                ("lora_up.weight", "lora_B.weight"), ("lora_down.weight", "lora_A.weight")))  # fmt: skip
            made[stem] = up @ down * (1 if alpha is None else alpha / len(down))
        elif "hada_w1_a" in part:
            both = (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
            made[stem] = both * (1 if alpha is None else alpha / len(part["hada_w1_b"]))
        elif "lokr_w2" in part:
            w1 = part["lokr_w1"] if "lokr_w1" in part else part["lokr_w1_a"] @ part["lokr_w1_b"]
            scale = 1 if alpha is None or "lokr_w1" in part else alpha / len(part["lokr_w1_b"])
            made[stem] = torch.kron(w1, part["lokr_w2"]) * scale
        else:
            made[stem] = part["diff"]
    return made


def kinds(seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    at = "lora_unet_output_blocks_{}_1_transformer_blocks_{}_attn2_to_v"
    lora = {}
    for place in (0, 1):
        name = at.format(place, "{}").format
        lora |= {f"{name(1)}.lora_down.weight": r(3, 6), f"{name(1)}.lora_up.weight": r(4, 3)}
        lora |= {
            f"{name(2)}.lora_A.weight": r(3, 6),
            f"{name(2)}.lora_B.weight": r(4, 3),
            f"{name(2)}.alpha": torch.tensor(1.5),
        }
        lora |= {
            f"{name(3)}.hada_w1_a": r(4, 2),
            f"{name(3)}.hada_w1_b": r(2, 6),
            f"{name(3)}.hada_w2_a": r(4, 2),
            f"{name(3)}.hada_w2_b": r(2, 6),
            f"{name(3)}.alpha": torch.tensor(1.0),
        }
        lora |= {f"{name(4)}.lokr_w1": r(2, 2), f"{name(4)}.lokr_w2": r(2, 3), f"{name(4)}.alpha": torch.tensor(9.0)}
        lora |= {f"{name(5)}.lokr_w1_a": r(2, 2), f"{name(5)}.lokr_w1_b": r(2, 2), f"{name(5)}.lokr_w2": r(2, 3)}
        lora |= {f"{name(6)}.diff": r(4, 6)}
    return lora  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(-3, 3).filter(lambda s: abs(s) > 1e-3), st.sampled_from([0.0, 1.0, 0.4]))
def test_strength_of_every_kind(seed, inside, outside):
    lora = kinds(seed)
    before, made = changes(lora), filter_blocks(lora, "style blocks", inside, outside).lora
    after = changes(made)
    for stem, change in before.items():
        strength = inside if "output_blocks_1_" in stem else outside
        found = after.get(stem, torch.zeros_like(change))
        assert torch.allclose(found, strength * change, rtol=1e-5, atol=1e-6), stem
    assert made.keys() - lora.keys() <= {f"{stem}.alpha" for stem in before}


def test_kinds_that_do_not_scale_may_be_left_out_or_kept():
    stem = "lora_unet_output_blocks_1_1_transformer_blocks_{}_attn2_to_v"
    lora = lora_of([stem.format(0), stem.format(1)])
    lora[stem.format(1) + ".dora_scale"] = torch.ones(5, 1)
    assert filter_blocks(lora, "style blocks").lora.keys() == lora.keys()
    with pytest.raises(StyleLoomError, match=r"dora_scale is a part of .*\(DoRA\) whose change does not scale"):
        filter_blocks(lora, "style blocks", 0.5)
    with pytest.raises(StyleLoomError, match="nothing of the LoRA is left"):
        filter_blocks(lora, "style blocks", 0.0, 1.0)


def test_patterns_and_attention():
    stems = [f"diffusion_model.layers.{i}.{part}" for i in range(3) for part in ("attention.to_q", "feed_forward.w1")]
    lora = lora_of(stems, (".lora_A.weight", ".lora_B.weight"))
    stem = lambda key: key.split(".lora_")[0]  # noqa: E731
    assert {stem(k) for k in filter_blocks(lora, "attention only").lora} == set(stems[::2])
    made = filter_blocks(lora, "custom patterns", patterns="layers.1.*w1\nlayers_2")
    assert {stem(k) for k in made.lora} == {stems[3], stems[4], stems[5]}
    unet = lora_of(sum(names(SDXL, "kohya diffusers").values(), []))
    assert len(filter_blocks(unet, "custom patterns", patterns="up_blocks.0.attentions.1").lora) == 20
    for name in ("x.double_blocks.0.img_attn.qkv", "x.blocks.1.self_attn.q", names(SDXL, "kohya ldm")["output", 1][0],
                 "transformer.transformer_blocks.3.attn.to_add_out", "lora_unet_double_blocks_0_img_attn_qkv"):  # fmt: skip
        made = filter_blocks(lora_of([name, "lora_unet_up_blocks_0_attentions_1_proj_in"]), "attention only")
        assert {stem(k) for k in made.lora} == {name}


@pytest.mark.parametrize(("lora", "options", "words"), [
    ({}, {}, "the LoRA is empty"),
    (lora_of(["diffusion_model.layers.0.attention.to_q"]), {}, "no UNet whose style blocks are known"),
    (lora_of(["lora_unet_output_blocks_2_1_transformer_blocks_0_attn2_to_v"]), {}, "none of the LoRA's 1 layers"),
    (lora_of(["lora_unet_output_blocks_9_1_transformer_blocks_0_attn2_to_v"]), {"preset": "content blocks"},
     "content blocks of SD1.5 are not known"),
    (lora_of(["lora_unet_output_blocks_9_1_transformer_blocks_0_attn2_to_v"]),
     {"preset": "style blocks without the border"}, "without the border of SD1.5 are not known"),
    (lora_of(["lora_unet_double_blocks_12_img_mlp_0"]), {"preset": "layout"}, "layout of FLUX.1 are not known"),
    (lora_of(["lora_unet_double_blocks_12_img_mlp_0"]), {}, "none of the LoRA's 1 layers is inside"),
    (lora_of(["lora_unet_single_blocks_12_linear1"]), {}, "no UNet whose style blocks are known"),
    (lora_of(["a.attn.x"]), {"preset": "custom patterns"}, "patterns is empty"),
    (lora_of(["a.attn.x"]), {"preset": "custom patterns", "patterns": "mlp"}, "'mlp' matches none"),
    (lora_of(["a.attn.x"]), {"preset": "x"}, "preset is 'x'"),
    ({"a.attn.x.weight": torch.ones(1)}, {}, "whose layer cannot be told"),
])  # fmt: skip
def test_refusals(lora, options, words):
    with pytest.raises(StyleLoomError, match=words):
        filter_blocks(lora, **({"preset": "style blocks"} | options))


def test_metadata_stays():
    from styleloom.weights.lora.lora_model import LoRAModel

    lora = LoRAModel(lora_of(sum(names(SDXL, "peft").values(), [])), {"recipe": "x"})
    assert filter_blocks(lora, "style blocks").lora.metadata == {"recipe": "x"}
