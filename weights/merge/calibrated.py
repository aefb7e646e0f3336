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
from .two_loras import Prepared, prior_columns
from .gauge import Gauge
from .methods.router import route
from .priors import Prior
from .ziprank import Masks, keep_strength, separated

MIX, RIDGE = 0.2, 1e-2  # share of the file's own Gram; of the trace over R


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


def solve_box(system: torch.Tensor, right: torch.Tensor, start: torch.Tensor, rounds: int = 400) -> torch.Tensor:
    """argmin ½ zᵀ G z − gᵀ z over [0, 1]ᴿ by accelerated projected gradients with restarts.

    Each coordinate has the step 1 / Σ_j |G_ij|, which never overshoots (the diagonal of those sums dominates G).

    Args:
        system: (…, R, R) positive semidefinite. right, start: (…, R). Float64.
    """
    rate = 1 / system.abs().sum(-1).clamp_min(torch.finfo(system.dtype).tiny)
    z = ahead = start.clamp(0, 1)
    t = 1.0
    for _ in range(rounds):
        slope = (system @ ahead[..., None])[..., 0] - right
        new = (ahead - rate * slope).clamp(0, 1)
        if float(((ahead - new) * (new - z)).sum()) > 0:  # going uphill: forget the momentum
            t = 1.0
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        ahead, z, t = new + (t - 1) / following * (new - z), new, following
    return z


def solve_layer(gauge: Gauge, grams: tuple[torch.Tensor, torch.Tensor], p_c: float, p_s: float, start: Masks) -> Masks:
    """The masks of one layer at γ = 1. A prior of 0 leaves that LoRA out.

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
    z = solve_box(system, right, torch.cat(start[:2]))
    return Masks(z[:r_c], z[r_c:])


def solve_calibrated(
    prepared: Prepared,
    measured: list[tuple[torch.Tensor | None, torch.Tensor | None]],
    prior: Prior,
    separation: float,
    keep: bool,
    start: Masks,
) -> Masks:
    """Masks of all shared layers, filled up as `fast.solve_fast` gives them.

    Args:
        measured: H_c and H_s of each shared layer, None where nothing was seen.
        start: the fast masks at γ = 1.
    """
    p_c, p_s = prior_columns(prepared, prior)
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
        raised = keep_strength(prepared.moments, masks)
        alone = (p_c == 0) | (p_s == 0)
        masks = Masks(*(torch.where(alone, old, new) for old, new in zip(masks[:2], raised)))
    return separated(masks, separation)


def routed(
    gauge: Gauge,
    measured: tuple[torch.Tensor | None, torch.Tensor | None],
    p_c: float,
    p_s: float,
    separation: float,
    ridge: float = 0.1,
) -> LowRank:
    """One layer by the router: L = U (I + γ (M − I)) V with M from the mixed Grams."""
    grams = [mixed(found, own) for found, own in zip(measured, file_grams(gauge))]
    sizes = [gauge.up_c.shape[1], gauge.up_s.shape[1]]
    matrix = route(grams, sizes, ridge, [p_c, p_s])
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    matrix = eye + separation * (matrix - eye)
    up = torch.cat((gauge.up_c, gauge.up_s), 1)
    return LowRank(torch.cat((gauge.down_c, gauge.down_s)), up @ matrix.to(up.dtype))
