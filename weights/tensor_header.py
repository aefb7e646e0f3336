"""The header of a safetensors file, read with suspicion.

`read_header` looks at the first bytes only and checks everything that they promise against the file itself, so
that a truncated download or a header that lies is told apart from a file of the wrong kind.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header, raw data).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from . import strict_json
from .errors import StyleLoomError
from .strict_json import shorten

# The format's own limit on its header.
MAX_HEADER_BYTES = 100_000_000

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_FIELDS = {"dtype", "shape", "data_offsets"}
# torch counts the elements of a tensor in 63 bits.
_MAX_ELEMENTS = 2**63 - 1


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header; `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What the first bytes of a safetensors file say, checked against its size."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self.tensors.items()}


def broken(
    path: Path,
    what: str,
    expected: str = "a whole safetensors file",
    fix: str = "Download or export the file again.",
) -> StyleLoomError:
    """The error for a damaged file, to be raised."""
    return StyleLoomError(f"{path.name}: {what}", expected, fix)


def unreadable(path: Path, error: OSError) -> StyleLoomError:
    """The error for a file that the operating system does not give, to be raised."""
    return broken(
        path,
        f"the system cannot read it: {error.strerror or error}",
        "a file that can be read",
        "Check the file's permissions, and the disk or network drive that it is on.",
    )


def _not_safetensors(path: Path, start: bytes) -> StyleLoomError:
    what = "the first bytes are not those of a safetensors file"
    fix = "Download or export the file again."
    if start[:2] == b"PK" or start[:1] == b"\x80":
        what = "this is a pickled PyTorch file (.bin, .pt, .ckpt), whatever its name says"
        fix = "Use the publisher's .safetensors file."
    elif start[:7] == b"version":
        what = "this is a Git LFS pointer, not the file itself"
        fix = "Download the file itself (with git-lfs, or from the download button of its page)."
    elif start.lstrip()[:1] == b"<":
        what = "this is a web page, not a model file"
        fix = "The download was answered with a page (a login or an error): download it again."
    return broken(path, what, fix=fix)


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        Names, dtypes, shapes and byte ranges of all tensors, and the metadata.

    Raises:
        StyleLoomError: no such file, not readable, not safetensors, truncated, or a header that is malformed or whose
            shapes, dtypes and byte ranges contradict one another or the size of the file. Nothing else comes out,
            whatever the bytes of the file are.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise StyleLoomError(f"{path.name}: this is a folder", "a safetensors file", "Choose a file inside it.")
        if not path.is_file():
            raise StyleLoomError(
                f"{path.name}: no such file", "a safetensors file", "Check the name, and that the file was not moved."
            )
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            start = f.read(16)
            if len(start) < 8:
                raise broken(path, f"the file is only {size} bytes long")
            (length,) = struct.unpack("<Q", start[:8])
            if length > MAX_HEADER_BYTES or start[8:9] != b"{":
                raise _not_safetensors(path, start)
            f.seek(8)
            raw = f.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) < length:
        raise broken(path, f"truncated: its header needs {8 + length} bytes and the file has {size}")
    try:
        entries = strict_json.parse(raw)
    except ValueError as error:
        raise broken(path, f"the header is not valid JSON ({error})") from error

    metadata = _read_metadata(path, entries.pop("__metadata__", None))
    data_start, data_size = 8 + length, size - 8 - length
    tensors = {key: _read_entry(path, key, entry, data_start) for key, entry in entries.items()}
    at = data_start
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            raise broken(
                path,
                f"the header puts {shorten(key)} at byte {info.start - data_start} of the data, "
                f"where {at - data_start} is due",
                "tensors one after another, without gaps or overlaps",
            )
        at = info.end
    if at - data_start > data_size:
        raise broken(
            path, f"truncated: the header promises {at - data_start} bytes of tensors and the file holds {data_size}"
        )
    if at - data_start < data_size:
        raise broken(path, f"{data_size - (at - data_start)} bytes follow the last tensor, unannounced")
    return Header(path, tensors, metadata)


def _read_metadata(path: Path, found: object) -> dict[str, str]:
    what, wrong = "__metadata__", found
    if isinstance(found, dict):
        key = next((key for key, value in found.items() if not isinstance(value, str)), None)
        if key is None:
            return found
        what, wrong = f"__metadata__, entry {shorten(key)},", found[key]
    elif found is None:
        return {}
    raise broken(path, f"the header's {what} is {strict_json.kind(wrong)}", "an object that holds texts only")


def _read_entry(path: Path, key: str, entry: object, data_start: int) -> TensorInfo:
    def wrong(what: str, expected: str) -> StyleLoomError:
        return broken(path, f"in the header's entry for the tensor {shorten(key)}, {what}", expected)

    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = f"of {', '.join(map(shorten, list(entry)[:6])) or 'nothing'}" if isinstance(entry, dict) else ""
        raise broken(
            path,
            f"the header's entry for the tensor {shorten(key)} is not an object with the three fields of one, but "
            f"{strict_json.kind(entry)} {found}".rstrip(),
            "dtype, shape and data_offsets",
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise wrong(f"its dtype is not a text, but {strict_json.kind(dtype)}", f"one of {', '.join(_BITS)}")
    if dtype not in _BITS:
        raise StyleLoomError(
            f"{path.name}: the tensor {shorten(key)} has the unknown dtype {shorten(dtype)}",
            f"one of {', '.join(_BITS)}",
            "Export the file with a current safetensors.",
        )
    if not _whole_numbers(shape):
        raise wrong(f"shape is not a list of sizes, but {_shown(shape)}", "whole numbers of 0 or more")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets is {_shown(offsets)}", "two whole numbers: first byte, end")
    elements = 1
    for size in shape:
        elements *= size or 1  # a size of 0 must not hide that the others are impossible
        if elements > _MAX_ELEMENTS:
            raise wrong(f"the shape {_shown(shape)} makes too many elements", "fewer than 2^63")
    start, end = offsets
    bits = 0 if 0 in shape else elements * _BITS[dtype]
    if bits != (end - start) * 8:
        raise broken(
            path,
            f"the header gives {shorten(key)} the shape {_shown(shape)} in {dtype} and {end - start} bytes, "
            "which do not fit each other",
            f"{bits / 8:g} bytes for this shape and dtype",
        )
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def _whole_numbers(value: object) -> bool:
    # type() and not isinstance(): True and False are ints in Python.
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _shown(value: object) -> str:
    if not isinstance(value, list):
        return strict_json.kind(value)
    words = [str(item) if type(item) is int else strict_json.kind(item) for item in value[:8]]
    return f"[{', '.join(words + ['…'] * (len(value) > 8))}]"


def header_mentions(path: str | os.PathLike, text: str) -> bool:
    """Whether the header of a safetensors file has this text in it: a cheap look, for sorting a list of files.

    False for whatever is no such file; `read_header` is what tells why.
    """
    with open(path, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        return length <= MAX_HEADER_BYTES and text.encode() in f.read(length)
