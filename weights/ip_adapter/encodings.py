"""Encoded pictures as a file: whoever has it needs neither the pictures nor the image encoder.

A safetensors file with what an image encoder gave, number for number: `image_embeds` (pictures, length), what base
adapters read; `penultimate_hidden_states` (pictures, tokens, width), what plus adapters read; and `empty`, the same of
an empty picture, which the negative side of plus adapters needs. The header says which encoder it was.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..clip_space.towers import image_tower
from ..errors import StyleLoomError
from ..tensor_file import TensorFile, read_header, write_tensor_file

FORMAT = "styleloom.style_encoding"
FORMAT_VERSION = "1"
EMBEDS, HIDDEN, EMPTY = "image_embeds", "penultimate_hidden_states", "empty"
_DIMENSIONS = {EMBEDS: 2, HIDDEN: 3, EMPTY: 3}


@dataclass(frozen=True, eq=False)
class Encoding:
    """What is in a file. One of `embeds` and `hidden` may be missing; `subtracted`: what Content Subtract noted."""

    embeds: torch.Tensor | None
    hidden: torch.Tensor | None
    empty: torch.Tensor | None = None
    subtracted: str = ""

    def __len__(self) -> int:
        return len(self.hidden if self.embeds is None else self.embeds)

    @property
    def encoder(self) -> str:
        """The image encoder, in words."""
        if self.embeds is None or self.hidden is None:
            found = [f"{t.shape[-1]} numbers" for t in (self.embeds, self.hidden) if t is not None]
            return f"an encoder of {', '.join(found)}"
        sizes = (self.hidden.shape[2], self.embeds.shape[1], self.hidden.shape[1])
        tower = image_tower(*sizes)
        return tower.name if tower else "an encoder of width {}, {} projected, {} tokens".format(*sizes)


def save_encoding(path: str | os.PathLike, encoding: Encoding) -> None:
    """Write an encoding, in the dtypes that it has."""
    tensors = {EMBEDS: encoding.embeds, HIDDEN: encoding.hidden, EMPTY: encoding.empty}
    write_tensor_file(
        path,
        {name: value.detach().cpu().contiguous() for name, value in tensors.items() if value is not None},
        {
            FORMAT: FORMAT_VERSION,
            f"{FORMAT}.encoder": encoding.encoder,
            f"{FORMAT}.pictures": str(len(encoding)),
            f"{FORMAT}.subtracted": encoding.subtracted,
        },
    )


def _refuse(name: str, found: str) -> StyleLoomError:
    return StyleLoomError(
        f"{name}: {found}",
        "a file that Save Style Encoding wrote, or an .ipadpt file of IPAdapter Plus",
        "Choose such a file, or encode the pictures again and save them.",
    )


def load_encoding(path: str | os.PathLike) -> Encoding:
    """Read an encoding, or an `.ipadpt` of IPAdapter Plus: one tensor, of which nothing but its numbers is read.

    Raises:
        StyleLoomError: another kind of file, shapes that do not go together, values that are not finite.
    """
    name = os.path.basename(path)
    if str(path).endswith(".ipadpt"):
        return _checked(name, _plain_tensor(path, name), "")
    header = read_header(path)
    strange = sorted(set(header.tensors) - set(_DIMENSIONS))
    if FORMAT not in header.metadata or strange:
        what = f"it holds {', '.join(strange[:3])}" if strange else "its header does not say that it is one"
        raise _refuse(name, f"this is no style encoding: {what}")
    if header.metadata[FORMAT] != FORMAT_VERSION:
        raise StyleLoomError(
            f"{name}: a style encoding of format version {header.metadata[FORMAT]}",
            f"version {FORMAT_VERSION}",
            "Update StyleLoom.",
        )
    with TensorFile(header) as file:
        tensors = {key: file[key].clone() for key in header.tensors}
    return _checked(name, tensors, header.metadata.get(f"{FORMAT}.subtracted", ""))


def _plain_tensor(path: str | os.PathLike, name: str) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader says of a file that is none of these
        raise _refuse(name, f"it cannot be read as a tensor ({type(error).__name__})") from error
    key = {2: EMBEDS, 3: HIDDEN}.get(found.ndim if isinstance(found, torch.Tensor) else 0)
    if key is None:
        kind = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise _refuse(name, f"it holds {kind}, not (pictures, length) or (pictures, tokens, width)")
    return {key: found}


def _checked(name: str, tensors: dict[str, torch.Tensor], subtracted: str) -> Encoding:
    for key, value in tensors.items():
        if value.ndim != _DIMENSIONS[key] or 0 in value.shape or not value.is_floating_point():
            raise _refuse(name, f"{key!r} is {list(value.shape)} of {value.dtype}")
        if not bool(value.isfinite().all()):
            raise _refuse(name, f"{key!r} holds NaN or infinity")
    embeds, hidden, empty = (tensors.get(key) for key in (EMBEDS, HIDDEN, EMPTY))
    if embeds is None and hidden is None:
        raise _refuse(name, f"neither {EMBEDS!r} nor {HIDDEN!r} is there")
    if embeds is not None and hidden is not None and len(embeds) != len(hidden):
        raise _refuse(name, f"{len(embeds)} pictures in {EMBEDS!r} and {len(hidden)} in {HIDDEN!r}")
    if empty is not None and (hidden is None or empty.shape[1:] != hidden.shape[1:]):
        raise _refuse(name, f"{EMPTY!r} is {list(empty.shape)}, which does not go with {HIDDEN!r}")
    return Encoding(embeds, hidden, empty, subtracted)
