"""Where the tokens of a layer stand in the picture: the words in which the token tables of `unet` and `dit` answer.

A layer of a diffusion model sees a sequence (rows, tokens, channels) or a map (rows, channels, height, width). Some of
it is the picture that is being made, the *target*: each such token stands at a place of a grid. The rest has no place:
text, reference pictures, padding, and everything made of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Grid(NamedTuple):
    """Frames, height and width; a picture has one frame. Tokens run along the width first, then the height."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return math.prod(self)


def grid_of(shape) -> Grid:
    """The last two or three axes of a latent, (height, width) or (frames, height, width)."""
    return Grid(*(1, *shape)[-3:])


# What runs through a layer.
PICTURE = "picture"  # the target, and what an architecture lays beside it (reference pictures, padding)
TARGET = "target"  # the target alone, whatever is laid beside it elsewhere
JOINT = "joint"  # text and picture in one sequence
MAP = "map"  # a convolution whose output is the target's grid
NOWHERE = "nowhere"  # nothing of it has a place: text, time, modulation

# (number of tokens, their grid or None where they have no place), in the order of the sequence.
Layout = tuple[tuple[int, Grid | None], ...]


class NoPlaces(Exception):
    """No table knows this class of model, or this layer of it; the message says which."""


class Unplaced(Exception):
    """A layer's tokens fit nothing that the table of its model knows; the message says why."""


@dataclass(frozen=True)
class Given:
    """The sizes of what one call of a diffusion model is given.

    Attributes:
        latent: What each row of the batch shows of the latent.
        pictures: (name of the input, sizes of its latents) for reference pictures and the like.
        texts: (name of the input, number of tokens).
        others: Names of other inputs that are there.
    """

    latent: Grid
    pictures: tuple[tuple[str, tuple[Grid, ...]], ...] = ()
    texts: tuple[tuple[str, int], ...] = ()
    others: tuple[str, ...] = ()
