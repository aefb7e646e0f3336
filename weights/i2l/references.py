"""Encoded reference pictures: small enough to share as a file (11 kB a picture, and more only with residuals)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .. import strict_json
from ..errors import StyleLoomError
from ..tensor_file import TensorFile, read_header, write_tensor_file
from .file_recognition import describe

FORMAT = "styleloom.references"
FORMAT_VERSION = "1"


@dataclass(frozen=True, eq=False)
class References:
    """What the image encoders made of the pictures.

    Attributes:
        embeddings: (N, in_dim) bf16, SigLIP2's pooled output before DINOv3's CLS.
        images: N hashes (SHA-256 of size and 8-bit RGB) of the pictures.
        residual_coarse: (N, 71, text_width) bf16 or None, hidden states for Coarse predictors.
        residual_fine: (N, 1376, text_width) bf16 or None, for Fine predictors.
        encoders: what made them: names, fingerprints, precision. Strings.
    """

    embeddings: torch.Tensor
    images: tuple[str, ...]
    residual_coarse: torch.Tensor | None = None
    residual_fine: torch.Tensor | None = None
    encoders: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def residual(self, kind: str) -> torch.Tensor | None:
        """Hidden states of a kind ('coarse' or 'fine'), None where there are none."""
        return {"coarse": self.residual_coarse, "fine": self.residual_fine}.get(kind)


def save_references(path: str | os.PathLike, references: References) -> None:
    """Write references: tensors `embeddings`, optional `residual_coarse`, `residual_fine`, all bf16."""
    tensors = {
        "embeddings": references.embeddings,
        "residual_coarse": references.residual_coarse,
        "residual_fine": references.residual_fine,
    }
    write_tensor_file(
        path,
        {key: value.to(torch.bfloat16) for key, value in tensors.items() if value is not None},
        {
            FORMAT: FORMAT_VERSION,
            f"{FORMAT}.images": json.dumps(list(references.images)),
            f"{FORMAT}.encoders": json.dumps(references.encoders, sort_keys=True),
        },
    )


def load_references(path: str | os.PathLike) -> References:
    """Read references.

    Raises:
        StyleLoomError: not a references file, wrong shapes or dtypes, NaN, or metadata that is malformed.
    """
    header = read_header(path)
    where = header.name

    def refuse(found: str) -> StyleLoomError:
        return StyleLoomError(
            f"{where}: {found}",
            "a file written by Save References",
            "Choose such a file, or encode the pictures again and save them.",
        )

    info = header.tensors.get("embeddings")
    if info is None:
        raise refuse(f"this is {describe(header.tensors)}, without the tensor 'embeddings'")
    unknown = set(header.tensors) - {"embeddings", "residual_coarse", "residual_fine"}
    if unknown:
        raise refuse(f"unknown tensors {', '.join(sorted(unknown)[:3])}")
    if len(info.shape) != 2 or 0 in info.shape:
        raise refuse(f"'embeddings' is {list(info.shape)}, not (pictures, width)")
    version = header.metadata.get(FORMAT, FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise StyleLoomError(
            f"{where}: references of format version {version}", f"version {FORMAT_VERSION}", "Update StyleLoom."
        )
    count = info.shape[0]
    tensors = {}
    with TensorFile(header) as file:
        for key in header.tensors:
            value = file[key].to(torch.bfloat16, copy=True)
            if key != "embeddings" and (value.ndim != 3 or value.shape[0] != count or 0 in value.shape):
                raise refuse(f"{key!r} is {list(value.shape)} for {count} pictures")
            if not bool(value.isfinite().all()):
                raise refuse(f"{key!r} holds NaN or infinity")
            tensors[key] = value
    images = _read_json(header.metadata, "images", refuse)
    encoders = _read_json(header.metadata, "encoders", refuse)
    images = ["unknown"] * count if images is None else images
    encoders = {} if encoders is None else encoders
    for name, value, wanted in (("images", images, list), ("encoders", encoders, dict)):
        if not isinstance(value, wanted):
            raise refuse(f"its metadata {FORMAT}.{name} is {strict_json.kind(value)}, not {strict_json.kind(wanted())}")
        for inner in value.values() if wanted is dict else value:
            if not isinstance(inner, str):
                raise refuse(f"in its metadata {FORMAT}.{name}, a value is {strict_json.kind(inner)}, not a text")
    if len(images) != count:
        raise refuse(f"metadata of {len(images)} pictures for {count} embeddings")
    return References(**tensors, images=tuple(images), encoders=encoders)


def _read_json(metadata: dict[str, str], name: str, refuse: Callable[[str], StyleLoomError]) -> object:
    """A part of the metadata, None where it is absent."""
    key = f"{FORMAT}.{name}"
    if key not in metadata:
        return None
    try:
        value = strict_json.parse(metadata[key])
    except ValueError as error:
        raise refuse(f"its metadata {key} is not valid JSON ({error})") from error
    if value is None:
        raise refuse(f"its metadata {key} is null")
    return value


def stack_references(parts: Sequence[References]) -> References:
    """Put single references one after another. A residual is kept only where all parts have it."""

    def joined(key: str):
        tensors = [getattr(part, key) for part in parts]
        return None if any(t is None for t in tensors) else torch.cat(tensors)

    return References(
        joined("embeddings"),
        tuple(h for part in parts for h in part.images),
        joined("residual_coarse"),
        joined("residual_fine"),
        parts[0].encoders,
    )
