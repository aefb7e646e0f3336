"""The reader of safetensors: what it takes, what it refuses, and in which words."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from header_cases import check, files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from styleloom.weights.errors import StyleLoomError
from styleloom.weights.tensor_file import TensorFile, fingerprint, read_header, write_tensor_file


def _raw(path, header: dict | bytes, data: bytes = b"", length: int | None = None):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64]),
)
def test_reads_what_the_library_writes(tmp_path_factory, shapes, dtype):
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    save_file(tensors, str(path), metadata={"a": "b"})
    header = read_header(path)
    assert header.metadata == {"a": "b"}
    assert header.shapes == {key: tuple(value.shape) for key, value in tensors.items()}
    with TensorFile(header) as file:
        for key, value in tensors.items():
            assert file[key].dtype == dtype and torch.equal(file[key].double(), value.double())
            if value.ndim == 2 and value.numel():
                pieces = torch.cat([piece.double() for piece in file.rows(key, dtype)])
                assert torch.equal(pieces, value.double())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "only 0 bytes long"),
        (b"PK\x03\x04" + b"\0" * 60, "pickled PyTorch file"),
        (b"\x80\x02}q\x00" + b"\0" * 60, "pickled PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!doctype html><html><body>Login</body></html>", "a web page"),
        (b"\x01" * 64, "first bytes are not those of a safetensors file"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(StyleLoomError, match=words) as error:
        read_header(path)
    assert "model.safetensors" in error.value.found and error.value.fix


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (
            {"x": _entry(offsets=(0, 8))},
            b"\0" * 4,
            "truncated: the header promises 8 bytes of tensors and the file holds 4",
        ),
        ({"x": _entry(shape=(3,))}, b"\0" * 8, "'x' the shape \\[3\\] in F32 and 8 bytes, which do not fit"),
        ({"x": _entry(shape=(-2,))}, b"\0" * 8, r"'x'.*sizes, but \[-2\]"),
        ({"x": _entry(offsets=(-8, 0))}, b"\0" * 8, r"'x'.*data_offsets is \[-8, 0\]"),
        ({"x": _entry(), "y": _entry()}, b"\0" * 8, "puts 'y' at byte 0 of the data, where 8 is due"),
        ({"x": _entry(offsets=(4, 12))}, b"\0" * 12, "puts 'x' at byte 4 of the data, where 0 is due"),
        ({"x": _entry()}, b"\0" * 12, "4 bytes follow the last tensor"),
        ({"x": _entry(dtype="Q4")}, b"\0" * 8, "unknown dtype 'Q4'"),
        ({"x": {"dtype": "F32"}}, b"", "'x' is not an object with the three fields of one, but an object of 'dtype'"),
        (b"{nonsense}", b"", "not valid JSON"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, words):
    with pytest.raises(StyleLoomError, match=words):
        read_header(_raw(tmp_path / "m.safetensors", header, data))


# No such case may be part of a test's name: they are too long to print.
_DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
_TWICE = json.dumps({"x": _entry()}).encode()[:-1] + b"," + json.dumps({"x": _entry()}).encode()[1:]


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"x": {**_entry(), "dtype": ["F32"]}}, b"\0" * 8, "'x'.*its dtype is not a text, but a list"),
        ({"x": {**_entry(), "dtype": {}}}, b"\0" * 8, "'x'.*its dtype is not a text, but an object"),
        ({"x": {**_entry(), "dtype": None}}, b"\0" * 8, "'x'.*its dtype is not a text, but null"),
        ({"x": {**_entry(), "data_offsets": "ab"}}, b"\0" * 8, "'x'.*data_offsets"),
        ({"x": {**_entry(), "data_offsets": [0, "8"]}}, b"\0" * 8, "'x'.*data_offsets"),
        ({"x": {**_entry(), "data_offsets": [0, 4, 8]}}, b"\0" * 8, "'x'.*data_offsets"),
        ({"x": {**_entry(), "data_offsets": [8, 0]}}, b"\0" * 8, "'x'.*data_offsets"),
        ({"x": {**_entry(), "data_offsets": {"0": 0, "8": 8}}}, b"\0" * 8, "'x'.*data_offsets"),
        ({"x": {**_entry(), "shape": "2"}}, b"\0" * 8, "'x'.*shape"),
        ({"x": {**_entry(), "shape": {"2": 1}}}, b"\0" * 8, "'x'.*shape"),
        ({"x": {**_entry(), "shape": [True, 2]}}, b"\0" * 8, "'x'.*shape"),
        ({"x": {**_entry(), "shape": [[2]]}}, b"\0" * 8, "'x'.*shape"),
        ({"x": {**_entry(), "shape": [2.0]}}, b"\0" * 8, "2.0"),
        ({"x": {**_entry(), "more": 1}}, b"\0" * 8, "'x'.*is not an object with the three fields"),
        ({"x": ["F32", [2], [0, 8]]}, b"\0" * 8, "'x'.*is not an object with the three fields"),
        ({"x": None}, b"", "'x'.*is not an object with the three fields"),
        ({"x": _entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, b"", "'x'.*too many elements"),
        ({"x": _entry(shape=(2**64 - 1,) * 9, offsets=(0, 8))}, b"\0" * 8, "'x'.*too many elements"),
        (b'{"x":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,8]}}', b"\0" * 8, "number"),
        ({"__metadata__": [["a", "b"]]}, b"", "__metadata__.*is a list"),
        ({"__metadata__": "pt"}, b"", "__metadata__.*is a text"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__.*'format'.*is a number"),
        ({"__metadata__": {"format": {}}}, b"", "__metadata__.*'format'.*is an object"),
        (_TWICE, b"\0" * 8, "'x' twice"),
        (b'{"__metadata__":{},"__metadata__":{}}', b"", "'__metadata__' twice"),
        (_DEEP, b"", "nested too deep"),
        (_DEEP[:60_000], b"", "nested too deep"),
        (b'{"x":NaN}', b"", "NaN"),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "surrogate"),
        (b'{"\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "not valid JSON"),
        (json.dumps({"x": _entry()}).encode("utf-16-le"), b"\0" * 8, "not valid JSON"),
        ({"x" * 10**6: None}, b"", "three fields"),
    ],
    ids=lambda value: value.replace(".*", " ") if isinstance(value, str) else "",
)
def test_only_our_error_comes_out_of_a_broken_header(tmp_path, header, data, words):
    with pytest.raises(StyleLoomError, match=words) as error:
        read_header(_raw(tmp_path / "m.safetensors", header, data))
    assert error.value.found.startswith("m.safetensors: ") and len(str(error.value)) < 1000


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=files)
def test_no_header_gets_past_that_safetensors_refuses(tmp_path_factory, content):
    check(tmp_path_factory.getbasetemp() / "fuzz.safetensors", content)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(StyleLoomError, match="is a folder"):
        read_header(tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2, 2)}, str(path))
    header = read_header(path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StyleLoomError, match="m.safetensors.*Permission denied"):
        read_header(path)
    with pytest.raises(StyleLoomError, match="m.safetensors.*Permission denied"):
        fingerprint(header)
    with TensorFile(header) as file, pytest.raises(StyleLoomError, match="m.safetensors.*Permission denied"):
        file["a"]


def test_tensors_that_cannot_be_given_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    whole = torch.ones(2, 2, dtype=torch.int64)
    save_file({"int": whole, "vector": torch.ones(3), "none": torch.ones(0, 4)}, str(path))
    with TensorFile(read_header(path)) as file:
        for read in (file.__getitem__, lambda key: list(file.rows(key, torch.float32))):
            with pytest.raises(StyleLoomError, match="m.safetensors: .*'int'.*I64"):
                read("int")
            with pytest.raises(StyleLoomError, match="m.safetensors: .*'other'"):
                read("other")
        with pytest.raises(StyleLoomError, match="m.safetensors: .*'vector'"):
            list(file.rows("vector", torch.float32))
        assert list(file.rows("none", torch.float32)) == []


def test_a_truncated_download_is_refused_at_every_length(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3)}, str(path))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StyleLoomError):
            read_header(path)


@pytest.mark.parametrize("shape", [(3, 700_000), (900, 5632), (40_000, 128), (2, 2_000_000)])
def test_large_matrices_come_in_pieces_of_rows(shape, tmp_path):
    """Also where a row alone is larger than the buffer."""
    path = tmp_path / "m.safetensors"
    value = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    save_file({"first": torch.ones(5), "m": value}, str(path))
    with TensorFile(read_header(path)) as file:
        first = 0
        for piece in file.rows("m", torch.float32):
            assert torch.equal(piece, value[first : first + len(piece)])
            first += len(piece)
        assert first == shape[0]
        assert torch.equal(torch.cat([piece.clone() for piece in file.rows("m", torch.float64)]), value.double())
        assert torch.equal(file["m"], value)


def test_a_file_that_is_cut_while_open_gives_an_error(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"m": torch.ones(3000, 1000)}, str(path))
    with TensorFile(read_header(path)) as file:
        pieces = file.rows("m", torch.float32)
        next(pieces)
        os.truncate(path, 5_000_000)
        with pytest.raises(StyleLoomError, match="ended while it was read"):
            list(pieces)


def test_missing_file(tmp_path):
    with pytest.raises(StyleLoomError, match="no such file"):
        read_header(tmp_path / "none.safetensors")


def test_fingerprint_follows_the_content_and_not_the_name(tmp_path):
    tensors = {"a": torch.arange(4096.0), "b": torch.ones(3)}
    for name, change in (("one", 0), ("two", 0), ("three", 1)):
        save_file({**tensors, "b": tensors["b"] + change}, str(tmp_path / name))
    one, two, three = (fingerprint(read_header(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two != three


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "out.safetensors"
    with pytest.raises(Exception):
        write_tensor_file(target, {"a": torch.ones(1)}, {"number": 1})
    assert list(tmp_path.iterdir()) == []
    write_tensor_file(target, {"a": torch.ones(3, 2).T}, {"k": "v"})
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    assert torch.equal(load_file(str(target))["a"], torch.ones(2, 3))


def test_a_cheap_look_into_a_header(tmp_path):
    from safetensors.torch import save_file

    from styleloom.weights.tensor_header import header_mentions

    save_file({"head.probe": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "short").write_bytes(b"abc")
    (tmp_path / "long").write_bytes(b"\xff" * 9)
    assert header_mentions(tmp_path / "a.safetensors", '"head.probe"')
    assert not header_mentions(tmp_path / "a.safetensors", "layer.0")
    assert not header_mentions(tmp_path / "short", "a") and not header_mentions(tmp_path / "long", "a")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
                                   torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_dtype_that_safetensors_writes_is_read(dtype, tmp_path):
    from safetensors.torch import save_file

    from styleloom.weights.tensor_header import read_header

    save_file({"a": torch.zeros(3, 5).to(dtype), "b": torch.zeros(2).to(dtype)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors").shapes == {"a": (3, 5), "b": (2,)}
