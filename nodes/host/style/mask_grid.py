"""A mask over the picture, at the size of every layer and for the part of the picture that a conditioning sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from ....weights.errors import StyleLoomError
from ..areas import noted_areas
from ..pictures import checked_mask

Area = tuple[int, int, int, int, int, int]  # height, width, top, left, of a latent of this height, width


def nearest(frames: Iterable[int], count: int) -> tuple[int, ...]:
    """Which of `count` pictures each frame gets: its own, or the last where there are fewer pictures than frames."""
    return tuple(min(frame, count - 1) for frame in frames)


def seen_by(options: Mapping, uuids: Iterable, shape: tuple[int, ...]) -> tuple[Area | None, ...]:
    """The area of each conditioning, for an input of `shape`. Areas of video latents (three dimensions) have no place
    in a UNet for pictures and are left out.

    Raises:
        StyleLoomError: the input is neither the picture nor the area: another node has cut it (tiles).
    """
    latent, areas = noted_areas(options)
    latent = shape if latent is None else latent
    found = [areas.get(uuid) if len(latent) == 2 else None for uuid in uuids]
    seen = tuple(None if area is None else (*area, *latent) for area in found)
    if any((latent if area is None else area[:2]) != shape for area in seen):
        raise StyleLoomError(
            f"the model is given a part of {list(shape)} of a latent of {list(latent)}, and Style Block Injector has a "
            "mask",
            "the whole picture, so that the mask can be laid over it",
            "Another node cuts the picture into tiles and does not say which one it is: leave mask of Style Block "
            "Injector unconnected, or leave the other node out.",
        )
    return seen


def grid(tokens: int, options: Mapping) -> tuple[int, int]:
    """(rows, columns) of a layer's tokens.

    Raises:
        StyleLoomError: another node changed the number of tokens, so that no place in the picture is known.
    """
    for shape in (options.get("activations_shape"), options.get("original_shape")):
        height, width = (shape or (0, 0, 0, 0))[-2:]
        while height * width > tokens and max(height, width) > 1:
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width == tokens:
            return height, width
    raise StyleLoomError(
        f"a layer has {tokens} tokens for a latent of {options.get('original_shape')}",
        "one token for each place, so that the mask can be laid over them",
        "Another node merges or drops tokens (ToMe, HyperTile): leave it out, or leave mask of Style Block Injector "
        "unconnected.",
    )


class MaskGrid:
    """(pictures, height, width) with 0 to 1, any size; averaged down to each layer."""

    def __init__(self, mask: torch.Tensor):
        self.mask = checked_mask(mask)
        self.pictures = len(self.mask)
        self._cache: dict = {}

    def forget(self) -> None:
        self._cache = {}

    def rows(
        self, q: torch.Tensor, options: Mapping, areas: tuple[Area | None, ...], frames: tuple[int, ...]
    ) -> torch.Tensor:
        """(1 or rows of q, tokens, 1) in the dtype and on the device of q (rows, tokens, width)."""
        return self.tokens(grid(q.shape[1], options), areas, frames, len(q), q)

    def tokens(
        self,
        size: tuple[int, int],
        areas: tuple[Area | None, ...],
        frames: tuple[int, ...],
        rows: int,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """(1 or rows, tokens, 1) for tokens of a known grid, in the dtype and on the device of `like`."""
        key = (size, areas, frames if self.pictures > 1 else (), rows, like.device, like.dtype)
        if key not in self._cache:
            if len(self._cache) > 64:
                self._cache = {}
            self._cache[key] = self._make(size, areas, frames, rows).to(like.device, like.dtype)
        return self._cache[key]

    def levels(
        self, shape: tuple[int, int], areas: tuple[Area | None, ...], frames: tuple[int, ...], rows: int, device
    ) -> dict[int, torch.Tensor]:
        """Number of tokens -> (1 or rows, tokens, 1) fp32, for every level of a UNet over an input of `shape`."""
        height, width = shape
        made = {}
        while True:
            made.setdefault(height * width, self._make((height, width), areas, frames, rows).to(device))
            if max(height, width) == 1:
                return made
            height, width = (height + 1) // 2, (width + 1) // 2

    def _make(
        self, size: tuple[int, int], areas: tuple[Area | None, ...], frames: tuple[int, ...], rows: int
    ) -> torch.Tensor:
        mask = self.mask[:, None]
        if self.pictures > 1:
            mask = mask[list(nearest(frames, self.pictures))]
        made = {None: mask} if None in areas else {}
        for area in set(areas) - {None}:
            height, width, top, left, *full = area
            cut = F.interpolate(mask, tuple(full), mode="area")
            made[area] = cut[..., top : top + height, left : left + width]
        made = {area: F.interpolate(t, size, mode="area").flatten(1)[..., None] for area, t in made.items()}
        if self.pictures == 1 and len(made) == 1:
            return next(iter(made.values()))
        each = rows // len(areas)
        return torch.cat([made[area].expand(each, -1, -1) for area in areas])
