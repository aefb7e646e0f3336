"""Numbers that depend on a seed and a name, never on the order of calls; files that appear whole or not at all.

numpy's generators rather than torch's: their streams are specified, so a file written on one machine has the
same bytes on another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

RECIPE_KEY = "styleloom_kit"  # the only metadata key: with two, their order in the file is not fixed
_RECIPE = re.compile(
    rb'\{"__metadata__":\{"' + RECIPE_KEY.encode() + rb'":"(?P<recipe>[^"]*) \[(?P<bytes>\d+) bytes\]"\}')


def generator(seed: int, name: str) -> np.random.Generator:
    """A generator for one tensor: the seed and the tensor's name decide everything."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def normal(seed: int, name: str, shape: tuple[int, ...], std: float = 1.0, mean: float = 0.0,
           dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of `shape` from N(mean, std²), drawn in float32 and rounded once to `dtype`."""
    values = generator(seed, name).standard_normal(math.prod(shape), dtype=np.float32).reshape(shape)
    values *= np.float32(std)
    if mean:
        values += np.float32(mean)
    return torch.from_numpy(values).to(dtype)


def save_whole(path: str | os.PathLike, tensors: dict[str, torch.Tensor], recipe: str) -> Path:
    """Writes a safetensors file next to `path` and moves it there in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    size = sum(v.numel() * v.element_size() for v in tensors.values())
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata={RECIPE_KEY: f"{recipe} [{size} bytes]"})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def written_recipe(path: str | os.PathLike) -> str | None:
    """The recipe of a whole file written by `save_whole`; None when it is missing, cut short or of other origin.

    Reads the first bytes only: the metadata stand first in the header, and the recipe knows the size of the data.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(4096)
    except OSError:
        return None
    match = _RECIPE.match(head[8:])
    if match is None:
        return None
    (header_length,) = struct.unpack("<Q", head[:8])
    recipe = json.loads(b'"' + match["recipe"] + b'"')
    return recipe if 8 + header_length + int(match["bytes"]) == size else None
