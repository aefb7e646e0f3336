"""ZipRank with measured inputs: R × R Grams of what each layer saw, instead of projectors from the file alone.

With H_k = V X_k X_kᵀ Vᵀ for the stacked rows V of both LoRAs, G_k = (UᵀU) ∘ H_k turns the objective of ziprank.py into

    f(z) = p_c (z − e_c)ᵀ G_c (z − e_c) + p_s (z − e_s)ᵀ G_s (z − e_s),   z in [0, 1]

and only R × R numbers a layer are kept of a run (never a d_in × d_in covariance). The inputs of a UNet have a large
part in common, which would pull all masks to the average, and the text layers see only 77 tokens: so each measured
Gram is mixed with the projector of the file, and has a ridge relative to its trace.
"""

from __future__ import annotations

import torch

from ..lora.low_rank import LowRank
from .box_qp import minimise_in_box
from .gauge import Gauge
from .methods.router import route
from .two_loras import Prepared, prior_columns
from .ziprank import Masks, keep_strength, leave_out, separated

MIX, RIDGE = 0.2, 1e-2  # share of the file's own Gram; of the trace over R
_ENOUGH = 1e-6  # how far the error may be above its minimum, as a share of the error of masks that are all 0


def file_grams(gauge: Gauge) -> tuple[torch.Tensor, torch.Tensor]:
    """H_c, H_s (R, R) float64 with the projectors onto the two row spaces for X Xᵀ."""
    rows = torch.cat((gauge.down_c, gauge.down_s)).double()
    inner_c, inner_s = rows @ gauge.down_c.double().T, rows @ gauge.down_s.double().T
    return inner_c @ inner_c.T, inner_s @ inner_s.T


def mixed(measured: torch.Tensor | None, file: torch.Tensor, mix: float = MIX, ridge: float = RIDGE) -> torch.Tensor:
    """(1 − mix) measured + mix file, each of trace 1, plus the ridge; the file's alone where nothing was measured."""
    file = file / file.trace()
    if measured is None or float(measured.trace()) <= 0 or not bool(measured.isfinite().all()):
        return file
    found = (1 - mix) * measured.double() / measured.double().trace() + mix * file
    return found + ridge / len(found) * torch.eye(len(found), dtype=found.dtype)


def solve_layer(gauge: Gauge, grams: tuple[torch.Tensor, torch.Tensor], p_c: float, p_s: float, start: Masks) -> Masks:
    """The masks of one layer at γ = 1. A weight of 0 leaves that LoRA out.

    Args:
        grams: H_c, H_s (R, R), content's rows first.
        start: where to begin; also what stays where the Grams say nothing.
    """
    r_c = gauge.up_c.shape[1]
    if p_c == 0 or p_s == 0:
        return Masks(torch.full_like(start.content, float(p_c > 0)), torch.full_like(start.style, float(p_s > 0)))
    up = torch.cat((gauge.up_c, gauge.up_s), 1).double()
    own = up.T @ up
    e_c = torch.cat((torch.ones_like(start.content), torch.zeros_like(start.style)))
    one, two = own * grams[0], own * grams[1]
    system, right = p_c * one + p_s * two, p_c * one @ e_c + p_s * two @ (1 - e_c)
    without = p_c * e_c @ one @ e_c + p_s * (1 - e_c) @ two @ (1 - e_c)  # the error of masks that are all 0
    enough = _ENOUGH * float(without) / 2
    z = minimise_in_box(system.mv, right, system.diagonal(), torch.cat(start[:2]), 0.0, 1.0, enough)
    return Masks(z[:r_c], z[r_c:])


def solve_calibrated(
    prepared: Prepared,
    measured: list[tuple[torch.Tensor | None, torch.Tensor | None]],
    separation: float,
    keep: bool,
    start: Masks,
) -> Masks:
    """Masks of all shared layers, filled up as `two_loras.solve_prepared` gives them.

    Args:
        measured: H_c and H_s of each shared layer, None where nothing was seen.
        start: the closed form's masks at γ = 1.
    """
    p_c, p_s = prior_columns(prepared, prepared.prior)
    content, style = start.content.clone(), start.style.clone()
    for index, gauge in enumerate(prepared.gauges):
        file = file_grams(gauge)
        grams = tuple(mixed(found, own) for found, own in zip(measured[index], file))
        mine = prepared.layer_masks(start, index)
        found = solve_layer(gauge, grams, float(p_c[index]), float(p_s[index]), mine)
        content[index, : found.content.numel()] = found.content
        style[index, : found.style.numel()] = found.style
    masks = Masks(content, style)
    if keep:
        masks = keep_strength(prepared.moments, masks)
    return leave_out(separated(masks, separation), p_c, p_s)


def routed(
    gauge: Gauge,
    measured: tuple[torch.Tensor | None, torch.Tensor | None],
    p_c: float,
    p_s: float,
    separation: float,
    ridge: float = 0.1,
) -> LowRank:
    """One layer by the router: L = U (I + γ (M − I)) V with M from the mixed Grams. A weight of 0 leaves that LoRA
    out."""
    if p_c == 0 or p_s == 0:
        return LowRank(gauge.down_c, gauge.up_c) if p_s == 0 else LowRank(gauge.down_s, gauge.up_s)
    grams = [mixed(found, own) for found, own in zip(measured, file_grams(gauge))]
    sizes = [gauge.up_c.shape[1], gauge.up_s.shape[1]]
    matrix = route(grams, sizes, ridge, [p_c, p_s])
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    matrix = eye + separation * (matrix - eye)
    up = torch.cat((gauge.up_c, gauge.up_s), 1)
    return LowRank(torch.cat((gauge.down_c, gauge.down_s)), up @ matrix.to(up.dtype))
