"""References as a file."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.i2l.references import References, load_references, save_references, stack_references


def _references(count=2, width=12, coarse=False, fine=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g).bfloat16()  # noqa: E731
    return References(
        make(count, width),
        tuple(f"{seed}-{i}" for i in range(count)),
        make(count, 71, 4) if coarse else None,
        make(count, 1376, 4) if fine else None,
        {"siglip": "a", "dino": "b"},
    )


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 4), coarse=st.booleans(), fine=st.booleans())
def test_round_trip(tmp_path_factory, count, coarse, fine):
    path = tmp_path_factory.mktemp("r") / "style.safetensors"
    made = _references(count, coarse=coarse, fine=fine)
    save_references(path, made)
    read = load_references(path)
    assert torch.equal(read.embeddings, made.embeddings) and read.images == made.images and len(read) == count
    assert read.encoders == made.encoders
    for kind, present in (("coarse", coarse), ("fine", fine)):
        assert (read.residual(kind) is not None) == present
        assert not present or torch.equal(read.residual(kind), made.residual(kind))
    assert read.residual("unknown") is None


def test_a_published_embedding_takes_eleven_kilobytes(tmp_path):
    path = tmp_path / "style.safetensors"
    save_references(path, _references(10, 5632))
    assert path.stat().st_size / 10 < 11_600
    with safe_open(str(path), "pt") as f:
        assert f.get_slice("embeddings").get_dtype() == "BF16"
        assert json.loads(f.metadata()["styleloom.references.images"])[0] == "0-0"


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"diffusion_model.a.lora_A.weight": torch.ones(1, 1)}, {}, "this is a LoRA"),
        ({"embeddings": torch.ones(3)}, {}, r"'embeddings' is \[3\]"),
        ({"embeddings": torch.ones(0, 3)}, {}, r"'embeddings' is \[0, 3\]"),
        ({"embeddings": torch.ones(1, 3), "other": torch.ones(1)}, {}, "unknown tensors other"),
        ({"embeddings": torch.full((1, 3), float("nan"))}, {}, "holds NaN"),
        (
            {"embeddings": torch.ones(2, 3), "residual_fine": torch.ones(1, 4, 4)},
            {},
            r"'residual_fine' is \[1, 4, 4\] for 2",
        ),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references": "9"}, "format version 9"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": '["a", "b"]'}, "of 2 pictures for 1"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": "["}, "not valid JSON"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": "5"}, "images.*is a number"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": "[]"}, "metadata of 0 pictures for 1"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": '"a"'}, "images.*is a text"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": '{"a": "b"}'}, "images.*is an object"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": "[1]"}, "images.*is a number"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": "[null]"}, "images.*is null"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": "false"}, "images.*is true or false"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": "[" * 100_000}, "nested too deep"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.images": '["\\ud800"]'}, "surrogate"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.encoders": "[]"}, "encoders.*is a list"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.encoders": '{"a": {}}'}, "encoders.*is an object"),
        ({"embeddings": torch.ones(1, 3)}, {"styleloom.references.encoders": '{"a": "", "a": ""}'}, "'a' twice"),
        ({"embeddings": torch.ones(1, 3, dtype=torch.int64)}, {}, "'embeddings'.*I64"),
        (
            {"embeddings": torch.ones(1, 3), "residual_fine": torch.ones(1, 0, 4)},
            {},
            r"'residual_fine' is \[1, 0, 4\] for 1",
        ),
    ],
)
def test_other_files_are_refused(tensors, metadata, words, tmp_path):
    save_file(tensors, str(tmp_path / "r.safetensors"), metadata=metadata)
    with pytest.raises(StyleLoomError, match=words) as error:
        load_references(tmp_path / "r.safetensors")
    assert error.value.found.startswith("r.safetensors")


def test_bare_embeddings_from_another_tool_are_taken(tmp_path):
    save_file({"embeddings": torch.ones(2, 6)}, str(tmp_path / "r.safetensors"))
    assert load_references(tmp_path / "r.safetensors").images == ("unknown", "unknown")


def test_stacking_keeps_a_residual_only_where_all_have_it():
    stacked = stack_references([_references(1, coarse=True, fine=True), _references(2, coarse=True, seed=1)])
    assert len(stacked) == 3 and stacked.images == ("0-0", "1-0", "1-1")
    assert stacked.residual_coarse.shape == (3, 71, 4) and stacked.residual_fine is None
