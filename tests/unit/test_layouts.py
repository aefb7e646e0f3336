"""Names, shapes and order of the published predictors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from small import Q_COARSE, Q_FINE, Q_SMALL, Z_SMALL, random_tensors, write_predictor

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l.header import PUBLISHED, key_hash, recognise_predictor
from styleloom.weights.i2l.layouts import FAMILIES, PredictorSpec, Residual, key_shapes, targets
from styleloom.weights.tensor_file import Header, TensorInfo, read_header

Z, QWEN = FAMILIES["z-image"], FAMILIES["qwen-image"]
# (checkpoint, spec, published MD5, number of tensors, number of parameters): the facts are those of the publisher's
# registry (DiffSynth-Studio, diffsynth/configs/model_configs.py) and file sizes.
CHECKPOINTS = [
    ("style", PredictorSpec(QWEN, 64, 5632, 4, QWEN.widths), "0aad514690602ecaff932c701cb4b0bb", 2880, 2_406_481_920),
    (
        "coarse",
        PredictorSpec(QWEN, 128, 5632, 4, QWEN.widths, Residual(3584, 71, 1024)),
        "a166c33455cdbd89c0888a3645ca5c0f",
        3360,
        7_927_234_560,
    ),
    (
        "fine",
        PredictorSpec(QWEN, 128, 5632, 4, QWEN.widths, Residual(3584, 1376, 64)),
        "a5476e691767a4da6d3a6634a10f7408",
        3360,
        7_573_340_160,
    ),
    ("z-image", PredictorSpec(Z, 128, 5632, 4, Z.widths), "9510cb8cd1dd34ee0e4f111c24905510", 952, 1_613_234_176),
    ("z-image 64", PredictorSpec(Z, 64, 5632, 4, Z.widths), "4f04fa4db33673882c675f426bf42602", 952, None),
    ("z-image 256", PredictorSpec(Z, 256, 5632, 4, Z.widths), "cd7427f65cd4cc8092c00c373e2e0a23", 952, None),
]


def _header(shapes, tmp_path, dtype="BF16"):
    return Header(tmp_path / "model.safetensors", {k: TensorInfo(dtype, tuple(s), 0, 0) for k, s in shapes.items()}, {})


@pytest.mark.parametrize(
    ("name", "spec", "md5", "tensors", "parameters"), CHECKPOINTS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_published_hashes_are_reproduced(name, spec, md5, tensors, parameters, tmp_path):
    shapes = key_shapes(spec)
    assert len(shapes) == tensors
    assert parameters in (None, sum(torch.Size(s).numel() for s in shapes.values()))
    assert key_hash(shapes) == md5 and md5 in PUBLISHED
    recognised = recognise_predictor(_header(shapes, tmp_path))
    assert recognised.spec == spec and recognised.spec.widths == spec.widths
    assert recognised.published == PUBLISHED[md5] and recognised.warning == ""


# Written out by hand from the publisher's code, not derived from the table under test: stored index → target.
# A wrong order would load without any error, as q, k, v and o (and w1 and w3) have one shape.
ORDER = {
    "z-image": {
        "layers_lora.blocks.0.layers.0": "layers.0.attention.to_q",
        "layers_lora.blocks.0.layers.1": "layers.0.attention.to_k",
        "layers_lora.blocks.0.layers.2": "layers.0.attention.to_v",
        "layers_lora.blocks.0.layers.3": "layers.0.attention.to_out.0",
        "layers_lora.blocks.29.layers.2": "layers.29.attention.to_v",
        "layers_lora.blocks.30.layers.0": "layers.0.feed_forward.w1",
        "layers_lora.blocks.30.layers.1": "layers.0.feed_forward.w2",
        "layers_lora.blocks.30.layers.2": "layers.0.feed_forward.w3",
        "layers_lora.blocks.59.layers.1": "layers.29.feed_forward.w2",
        "context_refiner_lora.blocks.1.layers.0": "context_refiner.1.attention.to_q",
        "context_refiner_lora.blocks.2.layers.0": "context_refiner.0.feed_forward.w1",
        "noise_refiner_lora.blocks.0.layers.3": "noise_refiner.0.attention.to_out.0",
        "noise_refiner_lora.blocks.3.layers.2": "noise_refiner.1.feed_forward.w3",
    },
    "qwen-image": {
        "blocks.0.layers.0": "transformer_blocks.0.attn.to_q",
        "blocks.7.layers.1": "transformer_blocks.7.attn.to_k",
        "blocks.59.layers.2": "transformer_blocks.59.attn.to_v",
        "blocks.59.layers.3": "transformer_blocks.59.attn.to_out.0",
        "blocks.60.layers.0": "transformer_blocks.0.img_mlp.net.2",
        "blocks.119.layers.1": "transformer_blocks.59.img_mod.1",
        "blocks.120.layers.0": "transformer_blocks.0.attn.add_q_proj",
        "blocks.121.layers.1": "transformer_blocks.1.attn.add_k_proj",
        "blocks.122.layers.2": "transformer_blocks.2.attn.add_v_proj",
        "blocks.179.layers.3": "transformer_blocks.59.attn.to_add_out",
        "blocks.180.layers.0": "transformer_blocks.0.txt_mlp.net.2",
        "blocks.239.layers.1": "transformer_blocks.59.txt_mod.1",
    },
}


@pytest.mark.parametrize("family", ORDER)
def test_order_of_targets(family):
    order = {target.stored: target.name for target in targets(FAMILIES[family])}
    assert len(order) == len(set(order.values())) == {"z-image": 238, "qwen-image": 720}[family]
    for stored, name in ORDER[family].items():
        assert order[stored] == name


@pytest.mark.parametrize("spec", [Z_SMALL, Q_SMALL, Q_COARSE, Q_FINE, replace(Z_SMALL, widths={"dim": 32, "mlp": 96})])
def test_unknown_widths_are_solved_and_warned_of(spec, tmp_path):
    recognised = recognise_predictor(read_header(write_predictor(tmp_path / "m.safetensors", spec)))
    assert recognised.spec == spec and recognised.spec.widths == spec.widths
    assert "not that of a published" in recognised.warning


@pytest.mark.parametrize("rank", [1, 2, 8, 32])
def test_other_ranks_at_the_published_width(rank, tmp_path):
    spec = PredictorSpec(Z, 16, 5632, rank, Z.widths)
    assert recognise_predictor(_header(key_shapes(spec), tmp_path)).spec.rank == rank


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F16", "BF16", "F32"])
def test_every_float_dtype_is_taken(dtype, tmp_path):
    assert recognise_predictor(_header(key_shapes(Z_SMALL), tmp_path, dtype)).spec == Z_SMALL


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"emb2lora.blocks.0.weight": (4, 4)}, "this is an i2L v2 predictor"),
        ({"module_dict.layers___0.lora_a": (4, 4)}, "compressed i2L predictor"),
        ({"diffusion_model.layers.0.attention.to_q.lora_A.weight": (4, 4)}, "this is a LoRA, not an i2L predictor"),
        ({"embeddings.patch_embedding.weight": (4, 3, 16, 16), "head.probe": (1, 1, 4)}, "SigLIP2-G384 image encoder"),
        ({"layer.0.mlp.gate_proj.weight": (4, 4)}, "DINOv3-7B image encoder"),
        ({"first_stage_model.decoder.conv_in.weight": (4, 4)}, "this is a checkpoint"),
        ({"alpha": (4,)}, "something else \\(first tensors: alpha\\)"),
        ({}, "without any tensor"),
    ],
)
def test_other_files_are_refused_by_what_they_are(keys, words, tmp_path):
    with pytest.raises(StyleLoomError, match=words) as error:
        recognise_predictor(_header(keys, tmp_path))
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("change", ["missing", "additional", "shape", "dtype", "first missing", "indivisible"])
def test_damaged_predictors_are_refused_with_the_key(change, tmp_path):
    tensors = random_tensors(Z_SMALL)
    key = "layers_lora.blocks.3.layers.1.proj_b.proj_out.weight"
    if change == "missing":
        del tensors[key]
    elif change == "additional":
        key = "layers_lora.blocks.60.layers.0.proj_a.proj_in.weight"
        tensors[key] = torch.zeros(5, 12)
    elif change == "shape":
        tensors[key] = torch.zeros(24, 6)
    elif change == "dtype":
        tensors[key] = torch.zeros(24, 5, dtype=torch.int8)
    elif change == "first missing":
        key = "layers_lora.blocks.0.layers.0.proj_a.proj_in.weight"
        del tensors[key]
    else:
        for name in list(tensors):
            if name.endswith("proj_out.weight") and tensors[name].shape[0] == 40:
                tensors[name] = torch.zeros(41, 5)
        key = "41"
    save_file(tensors, str(tmp_path / "m.safetensors"))
    with pytest.raises(StyleLoomError) as error:
        recognise_predictor(read_header(tmp_path / "m.safetensors"))
    assert key in error.value.found and "m.safetensors" in error.value.found
