"""LoRAs with a mask: what the host says of the places that one call of the model shows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ....weights.errors import StyleLoomError
from ....weights.places import NOWHERE, Given, Grid, NoPlaces, grid_of
from ....weights.row_adapters.layers import Layer
from ....weights.row_adapters.regional import in_region
from ....weights.row_adapters.regions import Maps, Places, Region, Scene, View
from ....weights.row_adapters.terms import Term
from ....weights.token_tables import Tokens, tokens_of
from ..areas import frames_of, noted_areas, pictures_of
from ..batch_rows import Rows
from ..row_terms import outside_memory_graph

_KEPT = 16  # kinds of calls that are remembered
_INSIDE = "diffusion_model."


class PlannedRegions:
    """The regions of a plan, and the layers in which they act.

    Args:
        model: MODEL.

    Attributes:
        regions: Branch -> one entry for each of its LoRAs: its region or None.
    """

    def __init__(self, model):
        self._model = model.model.diffusion_model
        self._tokens: Tokens | None = None
        self._layers: dict[str, tuple[str, int]] = {}
        self.regions: dict[int, list[Region | None]] = {}

    @property
    def any(self) -> bool:
        return bool(self._layers)

    def has_places(self, branch: int, name: str) -> set[int]:
        """The sources of a branch with a region that acts in a layer."""
        if name not in self._layers:
            return set()
        return {source for source, region in enumerate(self.regions[branch]) if region is not None}

    def acts_in(self, name: str, layer: Layer | None, region: Region) -> bool:
        """Whether a layer has places; if it has, the region acts in it from now on.

        Args:
            name: The layer's, in the MODEL.
            layer: None where its kind is not known.

        Raises:
            StyleLoomError: a model or a layer of which no table says where its tokens stand.
        """
        try:
            if not name.startswith(_INSIDE):
                raise NoPlaces(f"the layer {name}, outside of the diffusion model")
            self._tokens = self._tokens or tokens_of(self._model)
            stream = self._tokens.stream(name.removeprefix(_INSIDE))
        except NoPlaces as unknown:
            raise StyleLoomError(
                f"the {region.name} has a mask, and where the places of the picture are is not known for {unknown}",
                "a model whose order of tokens StyleLoom knows: SD1.5, SD2, SDXL, SD3, FLUX.1, FLUX.2, Chroma, Lumina "
                "2, Z-Image, Qwen-Image, AuraFlow, Krea 2, Wan, Hunyuan Video, LTX Video, Cosmos Predict 2, Anima",
                "Leave mask unconnected, or use ComfyUI's Create Hook LoRA with a conditioning mask.",
            ) from unknown
        if stream == NOWHERE:
            return False
        if layer is not None:
            self._layers[name] = (stream, layer.axis)
        return True

    def term(self, term: Term, key: str, region: Region) -> Term:
        """The term of a layer with places.

        Raises:
            StyleLoomError: this kind of adapter cannot act in a region there.
        """
        made = in_region(term)
        if made is None:
            kind = "norms" if term.layer.kind == "norm" else "GLoRA on convolutions"
            raise no_region(region, kind, key)
        return made

    def places(self, scene: Scene, maps: Maps) -> Places:
        return Places(self._tokens, self._layers, self.regions, scene, maps, outside_memory_graph)

    @property
    def tokens(self) -> Tokens:
        return self._tokens


def no_region(region: Region, kind: str, key: str) -> StyleLoomError:
    """The error for a patch that acts on the whole layer or not at all."""
    return StyleLoomError(
        f"the {region.name} has a mask, and some of its patches cannot act in a part of the picture: {kind}, for "
        f"example {key}",
        "a LoRA, LoHa, LoKr, OFT or difference of linear layers and convolutions",
        "Leave mask unconnected, or take these layers out of the LoRA.",
    )


class RegionalRun:
    """The regions of one sampling run.

    Args:
        planned: From the plan.
    """

    def __init__(self, planned: PlannedRegions):
        self._planned = planned
        self._maps = Maps()
        self._places: dict[tuple, Places] = {}

    def forget(self) -> None:
        self._maps, self._places = Maps(), {}

    def places(self, model, x: torch.Tensor, options: Mapping, rows: Rows, inputs: Mapping) -> Places:
        """The strengths at places for one call of a model.

        Args:
            model: The host's BaseModel.
            x: The call's latent, (rows, channels, ...).
            options: transformer_options, in which `note_areas` has left word.
            rows: What the rows of the batch are.
            inputs: The diffusion model's other inputs by name; `context` is the text.

        Raises:
            StyleLoomError: the call shows something else than the latent or a known part of it.
        """
        scene = self._scene(model, x, options, rows, inputs)
        key = (id(model), scene)
        if key not in self._places:
            if len(self._places) > _KEPT:
                self._places.clear()
            self._places[key] = self._planned.places(scene, self._maps)
        return self._places[key]

    def _scene(self, model, x: torch.Tensor, options: Mapping, rows: Rows, inputs: Mapping) -> Scene:
        axes, areas = noted_areas(options)
        each, own = x.shape[0] // len(rows.chunks), tuple(x.shape[2:])
        uuids = options.get("uuids") or [None] * (max(rows.chunks) + 1)
        found = tuple(areas.get(uuids[chunk]) for chunk in rows.chunks)
        shown = {axes if area is None else area[: len(own)] for area in found}
        if shown != {own} or len(own) not in (2, 3) or not rows.plain:
            raise StyleLoomError(
                f"another node shows the model {x.shape[0]} rows of {' x '.join(map(str, own))} of a latent of "
                f"{' x '.join(map(str, axes)) if axes else 'unknown size'}",
                "the whole latent, or the area of a conditioning, so that a LoRA's mask can be laid over it",
                "Leave out the node that cuts the latent into tiles or changes its size, or leave mask unconnected.",
            )
        latent = grid_of(own)
        pictures, total = pictures_of(options, each)
        frames, all_frames = frames_of(options, axes[0]) if len(own) == 3 else (None, 1)
        views = tuple(
            View(picture, frames, area and _six(area)) for area in found for picture in pictures
        )
        per_frame = getattr(model.latent_format, "temporal_downscale_ratio", 1) if len(own) == 3 else 1
        whole = Grid(all_frames, *axes[-2:])
        return Scene(_given(self._planned.tokens, latent, inputs), views, whole, total, per_frame)


def _six(area: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes and starts of three axes, of those of two."""
    half = len(area) // 2
    return (*grid_of(area[:half]), *((0, *area[half:])[-3:]))


def _given(tokens: Tokens, latent: Grid, inputs: Mapping) -> Given:
    def listed(name: str) -> list[torch.Tensor]:
        value = inputs.get(name)
        found = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]

    return Given(
        latent,
        tuple((name, tuple(grid_of(tensor.shape[2:]) for tensor in listed(name))) for name in tokens.pictures),
        tuple((name, sum(tensor.shape[1] for tensor in listed(name))) for name in tokens.texts),
        tuple(name for name in tokens.refused if any(tensor.numel() for tensor in listed(name))),
    )
