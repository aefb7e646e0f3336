"""Safetensors files, read with suspicion and in pieces.

`read_header` looks at the first bytes only and checks everything that they promise against the file itself, so
that a truncated download or a header that lies is told apart from a file of the wrong kind. `TensorFile` then reads
tensors, also far larger ones than there is memory for.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header, raw data).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

from .errors import StyleLoomError

# The format's own limit on its header.
MAX_HEADER_BYTES = 100_000_000

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
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
_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
FLOAT_DTYPES = frozenset(_DTYPES)

# How much of every tensor the fingerprint reads.
_FINGERPRINT_BYTES = 4096
# Small enough for the processor's cache, large enough that the calls for a piece do not count.
_PIECE_BYTES = 1 << 22


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


def _broken(path: Path, what: str, fix: str = "Download or export the file again.") -> StyleLoomError:
    return StyleLoomError(f"{path.name}: {what}", "a whole safetensors file", fix)


def _not_safetensors(path: Path, start: bytes) -> StyleLoomError:
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _broken(
            path,
            "this is a pickled PyTorch file (.bin, .pt, .ckpt), whatever its name says",
            "Use the publisher's .safetensors file.",
        )
    if start[:7] == b"version":
        return _broken(
            path,
            "this is a Git LFS pointer, not the file itself",
            "Download the file itself (with git-lfs, or from the download button of its page).",
        )
    if start.lstrip()[:1] == b"<":
        return _broken(
            path,
            "this is a web page, not a model file",
            "The download was answered with a page (a login or an error): download it again.",
        )
    return _broken(path, "the first bytes are not those of a safetensors file")


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        Names, dtypes, shapes and byte ranges of all tensors, and the metadata.

    Raises:
        StyleLoomError: no such file, not safetensors, truncated, or a header whose shapes, dtypes and byte
            ranges contradict one another or the size of the file.
    """
    path = Path(path)
    if not path.is_file():
        raise StyleLoomError(
            f"{path.name}: no such file", "a safetensors file", "Check the name, and that the file was not moved."
        )
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = f.read(16)
        if len(start) < 8:
            raise _broken(path, f"the file is only {size} bytes long")
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER_BYTES or start[8:9] != b"{":
            raise _not_safetensors(path, start)
        if 8 + length > size:
            raise _broken(path, f"truncated: its header needs {8 + length} bytes and the file has {size}")
        f.seek(8)
        raw = f.read(length)
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise _broken(path, f"the header is not valid JSON ({error})") from error

    metadata = entries.pop("__metadata__", None) or {}
    data_start, data_size = 8 + length, size - 8 - length
    tensors = {key: _read_entry(path, key, entry, data_start) for key, entry in entries.items()}
    at = data_start
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            raise _broken(
                path,
                f"the header puts {key!r} at byte {info.start - data_start} of the data, "
                f"where {at - data_start} is due",
            )
        at = info.end
    if at - data_start > data_size:
        raise _broken(
            path, f"truncated: the header promises {at - data_start} bytes of tensors and the file holds {data_size}"
        )
    if at - data_start < data_size:
        raise _broken(path, f"{data_size - (at - data_start)} bytes follow the last tensor, unannounced")
    return Header(path, tensors, metadata)


def _read_entry(path: Path, key: str, entry, data_start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"the header's entry for {key!r} is malformed") from error
    if dtype not in _BITS:
        raise StyleLoomError(
            f"{path.name}: tensor {key!r} has the unknown dtype {dtype!r}",
            f"one of {', '.join(_BITS)}",
            "Export the file with a current safetensors.",
        )
    if not whole or math.prod(shape) * _BITS[dtype] != (end - start) * 8:
        raise _broken(
            path,
            f"the header gives {key!r} the shape {list(shape)} in {dtype} and {end - start} bytes, "
            "which do not fit each other",
        )
    return TensorInfo(dtype, shape, data_start + start, data_start + end)


def header_mentions(path: str | os.PathLike, text: str) -> bool:
    """Whether the header of a safetensors file has this text in it: a cheap look, for sorting a list of files.

    False for whatever is no such file; `read_header` is what tells why.
    """
    with open(path, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
        return length <= MAX_HEADER_BYTES and text.encode() in f.read(length)


def fingerprint(header: Header) -> str:
    """A name for the content that costs milliseconds also where the file has 16 GB.

    SHA-256 over the sorted (name, dtype, shape) and the first 4 KiB of every tensor. Two checkpoints of one layout
    that were trained apart differ in it (Z-Image-i2L and Z-Image-Omni-Base-i2L share names and shapes); it is no
    protection against somebody who edits the middle of a tensor.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(header.path, "rb") as f:
        for key, info in sorted(header.tensors.items()):
            digest.update(f"{key}:{info.dtype}:{info.shape}".encode())
            f.seek(info.start)
            digest.update(f.read(min(_FINGERPRINT_BYTES, info.end - info.start)))
    return digest.hexdigest()


class TensorFile:
    """Tensors of one safetensors file, read piece by piece. Use as a context manager; threads may share it.

    Plain reads into a small buffer that is used again and again, one for each thread, and no memory map: mapping costs
    a page fault for every few pages, which is more than the copy where each byte is needed only once, and a file that
    is cut while it is mapped kills the process where a read gives an error.

    Args:
        header: from `read_header`.
    """

    def __init__(self, header: Header):
        self.header = header
        self._local = threading.local()
        self._handles: list[BinaryIO] = []

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc) -> None:
        self._local = threading.local()
        while self._handles:
            self._handles.pop().close()

    def _place(self) -> threading.local:
        if not hasattr(self._local, "file"):
            self._local.file = open(self.header.path, "rb", buffering=0)
            self._handles.append(self._local.file)
            self._local.buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
            self._local.view = memoryview(self._local.buffer.numpy())
        return self._local

    def _fill(self, file: BinaryIO, view: memoryview) -> None:
        while view:
            count = file.readinto(view)
            if not count:
                raise _broken(self.header.path, "the file ended while it was read; it was whole when it was opened")
            view = view[count:]

    def rows(self, key: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A matrix in pieces of whole rows, about 4 MB of the file each, in order.

        Yields:
            (some rows, columns) in `dtype`; each is overwritten when the next one is asked for.
        """
        info = self.header.tensors[key]
        count, columns = info.shape
        row_bytes = (info.end - info.start) // count
        place = self._place()
        place.file.seek(info.start)
        at_once = max(1, _PIECE_BYTES // row_bytes)
        buffer, view = place.buffer, place.view
        if row_bytes > _PIECE_BYTES:
            buffer = torch.empty(row_bytes, dtype=torch.uint8)
            view = memoryview(buffer.numpy())
        for first in range(0, count, at_once):
            some = min(at_once, count - first)
            self._fill(place.file, view[: some * row_bytes])
            piece = buffer[: some * row_bytes].view(_DTYPES[info.dtype]).view(some, columns)
            yield piece if piece.dtype == dtype else self._cast(piece, dtype)

    def _cast(self, piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Into a buffer that is used again too: thousands of short-lived ones leave the allocator with gigabytes."""
        buffer = getattr(self._local, "cast", None)
        if buffer is None or buffer.dtype != dtype or buffer.numel() < piece.numel():
            buffer = self._local.cast = torch.empty(max(piece.numel(), _PIECE_BYTES // 2), dtype=dtype)
        return buffer[: piece.numel()].view(piece.shape).copy_(piece)

    def __getitem__(self, key: str) -> torch.Tensor:
        """A whole tensor of a float dtype, in memory of its own."""
        info = self.header.tensors[key]
        data = torch.empty(info.end - info.start, dtype=torch.uint8)
        place = self._place()
        place.file.seek(info.start)
        self._fill(place.file, memoryview(data.numpy()))
        return data.view(_DTYPES[info.dtype]).view(info.shape)


def write_tensor_file(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all.

    Args:
        path: where to; its folder must exist.
        tensors: any dtypes and strides; written contiguous, in this order of names.
        metadata: strings.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
            str(part),
            metadata={"format": "pt", **metadata},
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
