"""Tensors of a safetensors file, read piece by piece, and such files written.

`TensorFile` reads tensors whose header `read_header` has checked, also far larger ones than there is memory for.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

from .strict_json import shorten
from .tensor_header import Header, TensorInfo, broken, header_mentions, read_header, unreadable

__all__ = [
    "FLOAT_DTYPES",
    "Header",
    "TensorFile",
    "TensorInfo",
    "fingerprint",
    "header_mentions",
    "read_header",
    "write_tensor_file",
]

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


def fingerprint(header: Header) -> str:
    """A name for the content that costs milliseconds also where the file has 16 GB.

    SHA-256 over the sorted (name, dtype, shape) and the first 4 KiB of every tensor. Two checkpoints of one layout
    that were trained apart differ in it (Z-Image-i2L and Z-Image-Omni-Base-i2L share names and shapes); it is no
    protection against somebody who edits the middle of a tensor.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    try:
        with open(header.path, "rb") as f:
            for key, info in sorted(header.tensors.items()):
                digest.update(f"{key}:{info.dtype}:{info.shape}".encode())
                f.seek(info.start)
                digest.update(f.read(min(_FINGERPRINT_BYTES, info.end - info.start)))
    except OSError as error:
        raise unreadable(header.path, error) from error
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

    def _info(self, key: str) -> TensorInfo:
        info = self.header.tensors.get(key)
        if info is None or info.dtype not in _DTYPES:
            state = "is missing" if info is None else f"is stored as {info.dtype}"
            raise broken(
                self.header.path, f"the tensor {shorten(key)} {state}", f"a tensor in one of {', '.join(_DTYPES)}"
            )
        return info

    def _place(self) -> threading.local:
        if not hasattr(self._local, "file"):
            try:
                self._local.file = open(self.header.path, "rb", buffering=0)
            except OSError as error:
                raise unreadable(self.header.path, error) from error
            self._handles.append(self._local.file)
            self._local.buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
            self._local.view = memoryview(self._local.buffer.numpy())
        return self._local

    def _fill(self, file: BinaryIO, view: memoryview) -> None:
        while view:
            try:
                count = file.readinto(view)
            except OSError as error:
                raise unreadable(self.header.path, error) from error
            if not count:
                raise broken(self.header.path, "the file ended while it was read; it was whole when it was opened")
            view = view[count:]

    def rows(self, key: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A matrix in pieces of whole rows, about 4 MB of the file each, in order.

        Yields:
            (some rows, columns) in `dtype`; each is overwritten when the next one is asked for. Nothing where the
            matrix is empty.

        Raises:
            StyleLoomError: no such tensor, no matrix, not of a float dtype, or the file cannot be read any more.
        """
        info = self._info(key)
        if len(info.shape) != 2:
            raise broken(self.header.path, f"the tensor {shorten(key)} is {list(info.shape)}", "a matrix")
        count, columns = info.shape
        if not count or not columns:
            return
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
        """A whole tensor in its own dtype and in memory of its own.

        Raises:
            StyleLoomError: no such tensor, not of a float dtype, or the file cannot be read any more.
        """
        info = self._info(key)
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
