"""Which part of a latent, and which of its pictures or frames, the rows of one call show: by what the host says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import comfy.samplers

from ...weights.errors import StyleLoomError

Area = tuple[int, ...]  # sizes and starts, one for each axis of the latent

_NOTED = "styleloom_latent"  # in transformer_options


def areas_of(conds: Iterable, shape: tuple[int, ...]) -> dict[object, Area]:
    """uuid -> area for the conditionings that see a part of a latent of `shape`, cut to it as the host cuts: the sizes
    along its two or three axes, then where they start."""
    found = {}
    for cond in (cond for side in conds for cond in side or ()):
        area = cond.get("area")
        if area is None:
            continue
        axes = len(shape)
        area = comfy.samplers.add_area_dims(list(area), axes)
        if len(area) // 2 > axes:
            area = area[:axes] + area[len(area) // 2 : len(area) // 2 + axes]
        sizes = (min(whole - start, size) for whole, size, start in zip(shape, area[:axes], area[axes:]))
        found[cond.get("uuid")] = (*sizes, *area[axes:])
    return found


def note_areas(options: dict, conds: Iterable, shape: tuple[int, ...]) -> None:
    """Leave word in `transformer_options` of the latent of a call of `calc_cond_batch`, and of the parts of it that
    conditionings see. Everything of ours with a mask reads the same."""
    options[_NOTED] = shape, areas_of(conds, shape)


def noted_areas(options: Mapping) -> tuple[tuple[int, ...] | None, Mapping[object, Area]]:
    """(the latent's axes, uuid -> area), as `note_areas` has left them; None and {} where it has not."""
    return options.get(_NOTED) or (None, {})


def pictures_of(options: Mapping, each: int) -> tuple[tuple[int, ...], int]:
    """(which pictures of the whole batch the rows of a side are, how many there are in all).

    The host's context windows and AnimateDiff-Evolved's (`ad_params`) show the model a part of the pictures at a time.
    """
    listed, total = _window(options, 0)
    if listed is not None and len(listed) == each:
        return listed, total
    params = options.get("ad_params") or {}
    if params.get("sub_idxs") is not None and len(params["sub_idxs"]) == each:
        return tuple(params["sub_idxs"]), params.get("full_length") or max(params["sub_idxs"]) + 1
    return tuple(range(each)), each


def frames_of(options: Mapping, shown: int) -> tuple[tuple[int, ...] | None, int]:
    """(which latent frames of a whole video a call shows, None for all of them; how many there are in all).

    Args:
        shown: How many frames the call's latent has.

    Raises:
        StyleLoomError: a context window with frames beside the ones that it names.
    """
    listed, total = _window(options, 2)
    if listed is None:
        return None, shown
    if len(listed) != shown:
        raise StyleLoomError(
            f"a context window shows the model {shown} frames and names {len(listed)} of them",
            "windows without guide frames, so that each frame of a mask has its place",
            "Leave out the guide frames or the context windows, or leave mask unconnected.",
        )
    return listed, total


def _window(options: Mapping, dim: int) -> tuple[tuple[int, ...] | None, int]:
    """(what the host's context window over an axis of the latent shows, the frame that it may lay before it first; how
    many there are in all), or None and 0."""
    window = options.get("context_window")
    if window is None or getattr(window, "dim", None) != dim:
        return None, 0
    anchor = getattr(window, "causal_anchor_index", None)
    listed = (*(() if anchor is None or anchor < 0 else (anchor,)), *window.index_list)
    return listed, getattr(window, "total_frames", 0) or max(listed) + 1
