"""An image encoder's file, recognised, with a memory of what it has seen."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch

from ..tensor_file import Header, fingerprint, read_header
from . import preprocess
from .towers import compute_dtype, recognise_tower

_PIXELS = {"siglip2": preprocess.siglip_pixels, "dinov3": preprocess.dino_pixels}


class EmbeddingCache(OrderedDict):
    """Embeddings by the hash of the picture, at most `LIMIT`, the oldest dropped first. 2048 pictures of DINOv3-7B are
    16 MB. A run that needs more than that keeps what it needs itself."""

    LIMIT = 2048

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        super().__setitem__(key, value)
        while len(self) > self.LIMIT:
            self.popitem(last=False)


@dataclass(frozen=True, eq=False)
class EncoderFile:
    """What a header says of an encoder; the weights stay on disk until it runs.

    Attributes:
        name: as the artist chose it.
        kind: 'siglip2' or 'dinov3'.
        config: its sizes.
        precision: one of `towers.PRECISIONS`.
        fingerprint: of the file's content.
        seen: embeddings (1, hidden) bf16 on the CPU by picture hash; lives as long as this object, so that its keys
            need name neither file nor precision.
    """

    name: str
    header: Header
    kind: str
    config: object
    precision: str
    fingerprint: str
    seen: EmbeddingCache = field(default_factory=EmbeddingCache)

    @property
    def blocks(self) -> int:
        return self.config.layers

    @property
    def description(self) -> str:
        """For metadata: which file made an embedding, and how."""
        return f"{self.name} {self.fingerprint} {self.precision}"

    def pixels(self, crop: np.ndarray) -> torch.Tensor:
        """The 1024 crop as this encoder reads it: (1, 3, side, side) in its compute dtype."""
        return _PIXELS[self.kind](crop)[None].to(compute_dtype(self.precision))


def open_encoder(path: str | os.PathLike, kind: str, precision: str, name: str = "") -> EncoderFile:
    """Recognise an encoder file by its header.

    Raises:
        StyleLoomError: no such file, damaged, another kind of file, or the other encoder.
    """
    compute_dtype(precision)
    header = read_header(path)
    found, config = recognise_tower(header.shapes, name or header.name, kind)
    return EncoderFile(name or header.name, header, found, config, precision, fingerprint(header))
