"""Masks over places: how strong an adapter is at each token of a layer.

A region is a mask over the picture that is being made. It is brought to the latent's size, then to the grid of each
layer, by averaging over areas, so a token has the share of its place that the mask covers. What has no place has the
region's `elsewhere`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import StyleLoomError
from ..places import Given, Grid, Unplaced
from ..token_tables import Tokens

_KEPT = 64  # arrangements that are remembered; keyframes make a new one in every step


@dataclass(frozen=True, eq=False)
class Region:
    """Where one LoRA acts.

    Attributes:
        name: What errors call it.
        masks: Each (pictures or frames, height, width) of any size, 0 to 1; they multiply.
        elsewhere: The share that tokens without a place get: 0 or 1.
    """

    name: str
    masks: tuple[torch.Tensor, ...]
    elsewhere: float = 0.0


@dataclass(frozen=True)
class View:
    """What one row of a batch shows.

    Attributes:
        picture: Its number among the pictures that are made.
        frames: Numbers of its latent frames, for the latent of a video; None: all.
        area: (frames, height, width, first frame, top, left) in the latent that it is cut out of; None: all.
    """

    picture: int = 0
    frames: tuple[int, ...] | None = None
    area: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Scene:
    """What one call of a model shows, in sizes: two calls of one scene have the same strengths at the same places.

    Attributes:
        given: See `Given`.
        views: One for each row.
        whole: The whole latent, of which rows may show parts.
        pictures: How many pictures are made in all.
        per_frame: Frames of the finished video for each latent frame but the first.
    """

    given: Given
    views: tuple[View, ...]
    whole: Grid
    pictures: int
    per_frame: int = 1


@dataclass(frozen=True, eq=False)
class Placed:
    """In the place of a strength: the strength at each place. `where` broadcasts over the layer's output, (1 or rows,
    tokens…, 1) or (1 or rows, 1, height, width)."""

    strength: float
    where: torch.Tensor


class Here(tuple):
    """A branch's strengths on one layer: numbers, and `Placed` for the sources that have a region.

    Attributes:
        kept: What terms make of them, for the layers that have the same.
        keeping: A context in which to make that.
    """

    kept: dict
    keeping: Callable[[], AbstractContextManager] = contextlib.nullcontext


def _resized(mask: torch.Tensor, region: Region, scene: Scene) -> torch.Tensor:
    """(pictures or 1, frames, height, width): a mask at the latent's size. Raises StyleLoomError: another number of
    masks than pictures or frames."""
    frames, height, width = scene.whole
    count = len(mask)
    small = F.interpolate(mask.float()[:, None], (height, width), mode="area")[:, 0]
    if count == 1:
        return small.expand(frames, -1, -1)[None]
    if frames == 1 and count == scene.pictures:
        return small[:, None]
    if frames > 1 and count == frames:
        return small[None]
    if frames > 1 and count == (frames - 1) * scene.per_frame + 1:  # a causal VAE: the first frame stands alone
        rest = small[1:].unflatten(0, (frames - 1, scene.per_frame)).mean(1)
        return torch.cat([small[:1], rest])[None]
    if frames == 1:
        wanted = "one mask" + (f", or {scene.pictures}, one for each picture" if scene.pictures > 1 else "")
    else:
        wanted = f"one mask, {frames} (one for each frame of the latent)"
        if scene.per_frame > 1:
            wanted += f" or {(frames - 1) * scene.per_frame + 1} (one for each frame of the video)"
    raise StyleLoomError(f"the mask of the {region.name} has {count} pictures", wanted, "Connect as many as that.")


class Maps:
    """The masks of a run at every size that was asked for, made once."""

    def __init__(self):
        self._latent: dict = {}

    def of_latent(self, region: Region, scene: Scene) -> torch.Tensor:
        """(1 or pictures, frames, height, width), float32 on the CPU."""
        key = (id(region), scene.whole, scene.pictures, scene.per_frame)
        if key not in self._latent:
            made = torch.ones(())
            for mask in region.masks:
                made = made * _resized(mask.cpu(), region, scene)
            self._latent[key] = made
        return self._latent[key]

    def of_view(self, region: Region, scene: Scene, view: View) -> torch.Tensor:
        """(frames, height, width) of what a row shows."""
        full = self.of_latent(region, scene)
        shown = full[view.picture if len(full) > 1 else 0]
        if view.frames is not None:
            shown = shown[list(view.frames)]
        if view.area is not None:
            sizes, starts = view.area[:3], view.area[3:]
            for axis, (size, start) in enumerate(zip(sizes, starts)):
                shown = shown.narrow(axis, start, size)
        return shown


def to_grid(shown: torch.Tensor, grid: Grid, patch: Grid) -> torch.Tensor:
    """(frames, height, width) averaged to a grid. Patches that stand over the edge count what is inside, as the last
    row or column repeated."""
    if tuple(shown.shape) == tuple(grid):
        return shown
    over = [-size % step for size, step in zip(shown.shape, patch)]
    if tuple(-(-size // step) for size, step in zip(shown.shape, patch)) == tuple(grid):
        full = F.pad(shown[None, None], (0, over[2], 0, over[1], 0, over[0]), mode="replicate")
        return F.avg_pool3d(full, tuple(patch))[0, 0]
    return F.adaptive_avg_pool3d(shown[None, None], tuple(grid))[0, 0]


class Places:
    """Strengths at places, for all layers and all calls of one scene on one device.

    Args:
        tokens: The model's token table.
        layers: Name of a layer with regions → (what runs through it, the axis of its channels). See `Tokens.stream`.
        regions: Branch → one entry for each source: its region or None.
        scene: What the calls show.
        maps: Shared by the scenes of a run.
        keeping: A context in which tensors are made that live on from call to call.
    """

    def __init__(
        self,
        tokens: Tokens,
        layers: Mapping[str, tuple[str, int]],
        regions: Mapping[int, Sequence[Region | None]],
        scene: Scene,
        maps: Maps,
        keeping: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ):
        self._tokens, self._layers, self._regions = tokens, layers, regions
        self._scene, self._maps, self._keeping = scene, maps, keeping
        self._where: dict = {}
        self._made: dict = {}

    def strengths(
        self,
        name: str,
        branch: int,
        first: int,
        rows: int,
        out: torch.Tensor,
        plain: tuple,
        copies: tuple[int, ...] | None = None,
    ) -> tuple:
        """A branch's strengths on the rows of a layer.

        Args:
            name: The layer's.
            first, rows: The run of rows.
            out: The layer's output, all rows; a linear layer's input does as well.
            plain: The strengths without places.
            copies: For each row of the layer the row of the batch that it is a copy of; None: they are the batch's.

        Raises:
            StyleLoomError: the places of the layer's tokens are not known.
        """
        found = self._layers.get(name)
        if found is None:
            return plain
        stream, axis = found
        shape = tuple(out.shape[2:] if axis == 1 else out.shape[1:-1])
        key = (stream, axis, shape, branch, first, rows, copies or out.shape[0], out.dtype, out.device)
        made = self._made.get(key)
        if made is None or made[0] != plain:
            if len(self._made) > _KEPT:
                self._made.clear()
            with self._keeping():
                made = self._made[key] = (plain, self._here(name, key, plain))
        return made[1]

    def _here(self, name: str, key: tuple, plain: tuple) -> Here:
        stream, axis, shape, branch, first, rows, total, dtype, device = key  # total: the rows, or `copies`
        here = []
        for source, (strength, region) in enumerate(zip(plain, self._regions[branch], strict=True)):
            if region is None or strength == 0:
                here.append(strength)
                continue
            whole = (stream, axis, shape, branch, source, total, dtype, device)
            if whole not in self._where:
                where = self._shares(name, region, stream, shape, total).to(device, dtype)
                self._where[whole] = where.unsqueeze(1 if axis == 1 else -1)
            where = self._where[whole]
            here.append(Placed(strength, where if len(where) == 1 else where.narrow(0, first, rows)))
        made = Here(here)
        made.kept, made.keeping = {}, self._keeping
        return made

    def _shares(self, name: str, region: Region, stream: str, shape: tuple[int, ...], rows) -> torch.Tensor:
        """(1 or rows, *shape), float32."""
        scene = self._scene
        try:
            views = [scene.views[row] for row in rows] if isinstance(rows, tuple) else scene.views
            if not isinstance(rows, tuple) and rows != len(views):
                raise Unplaced(f"it has {rows} rows for a batch of {len(views)}")
            layout = self._tokens.layout(stream, shape, scene.given)
        except Unplaced as why:
            raise StyleLoomError(
                f"the mask of the {region.name} finds no place in the layer {name}: {why}",
                "a sequence with one token for each place of the picture, as the model makes it by itself",
                "Another node may merge, drop, add or split tokens (ToMe, HyperTile, tiles, additional references): "
                "leave it out, or leave mask unconnected.",
            ) from why
        seen: dict = {}
        for view in views:
            if view not in seen:
                shown = self._maps.of_view(region, scene, view)
                seen[view] = torch.cat(
                    [
                        torch.full((count,), float(region.elsewhere))
                        if grid is None
                        else to_grid(shown, grid, self._tokens.patch).flatten()
                        for count, grid in layout
                    ]
                ).view(shape)
        if len(self._maps.of_latent(region, scene)) == 1 and len({(view.frames, view.area) for view in seen}) == 1:
            return next(iter(seen.values()))[None]
        return torch.stack([seen[view] for view in views])
