"""Convex quadratic problems in a box, by products alone.

MPRGP (Dostál and Schöberl, 2005): conjugate gradients on the free variables, a projected gradient step where a bound
is hit, and a release of bounds where that promises more. It ends with a certificate, not with a count of rounds: for a
convex f, f(x) − min f is at most the Frank-Wolfe gap Σ_i max over z in the box of gᵢ (xᵢ − zᵢ).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ROUNDS = 5000  # far more than any layer has needed


def gap(slope: torch.Tensor, x: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float) -> float:
    """The Frank-Wolfe gap: no point of the box is lower than f(x) by more than this. slope: the gradient at x."""
    return float(torch.where(slope == 0, 0, slope * (x - torch.where(slope > 0, low, high))).sum())


def minimise_in_box(
    product: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    diagonal: torch.Tensor,
    start: torch.Tensor,
    low: float,
    high: float,
    enough: float,
) -> torch.Tensor:
    """argmin ½ xᵀ Q x − gᵀ x over [low, high]ⁿ.

    Args:
        product: x → Q x, Q positive semidefinite. right: g. diagonal: of Q, for the scaling. All (n,) of one dtype.
        start: where to begin. Variables that Q does not see (diagonal 0) stay there.
        enough: the gap, in units of the problem's value, at which x is good enough.
    """
    seen = diagonal > torch.finfo(right.dtype).eps * diagonal.max()
    scale = torch.where(seen, diagonal, 1).rsqrt() * seen  # y = x / scale has a Q with ones on its diagonal
    floor, ceiling = low / scale, high / scale  # infinite where nothing is seen: those never move
    snap = 4 * torch.finfo(right.dtype).eps * (ceiling - floor)

    def scaled(y: torch.Tensor) -> torch.Tensor:
        return scale * product(scale * y)

    def parts(y: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The free and the chopped gradient."""
        at_floor, at_ceiling = y <= floor, y >= ceiling
        free = torch.where(at_floor | at_ceiling, 0, slope)
        return free, torch.where(at_floor, slope.clamp_max(0), 0) + torch.where(at_ceiling, slope.clamp_min(0), 0)

    def moved(y: torch.Tensor, step, along: torch.Tensor) -> torch.Tensor:
        new = y - step * along
        new = torch.where(new <= floor + snap, floor, torch.where(new >= ceiling - snap, ceiling, new))
        return torch.where(seen, new, y)

    def room(y: torch.Tensor, along: torch.Tensor) -> float:
        """The longest step that stays in the box."""
        left = torch.where(along > 0, (y - floor) / along, torch.where(along < 0, (y - ceiling) / along, torch.inf))
        return float(left.min())

    y = torch.where(seen, start.clamp(low, high) / torch.where(seen, scale, 1), 0)
    slope = scaled(y) - scale * right
    free, chopped = parts(y, slope)
    along, norm = free, 0.0
    for number in range(ROUNDS):
        if gap(slope, y, floor, ceiling) <= enough:
            break
        if number % 50 == 49:  # rounding has gathered
            slope = scaled(y) - scale * right
            free, chopped = parts(y, slope)
            along = free
        step = 1 / norm if norm else 0.0
        near = torch.where(free > 0, torch.minimum(free * step, y - floor), torch.maximum(free * step, y - ceiling))
        release = float(chopped.square().sum()) > float((near * free).nan_to_num(0, 0, 0).sum()) / (step or 1)
        if release:
            along = chopped
        ahead = scaled(along)
        curved = float((along * ahead).sum())
        norm = max(norm, curved / float(along.square().sum().clamp_min(torch.finfo(y.dtype).tiny)))
        best = float((slope * along).sum()) / curved if curved > 0 else float("inf")
        limit = room(y, along)
        y, slope = moved(y, min(best, limit), along), slope - min(best, limit) * ahead
        expand = best > limit and not release
        if expand:
            y = moved(y, 1 / norm, parts(y, slope)[0])
            slope = scaled(y) - scale * right
        free, chopped = parts(y, slope)
        along = free if release or expand else free - float((free * ahead).sum()) / curved * along
    return torch.where(seen, (scale * y).clamp(low, high), start)  # scaling back may round a bound outwards
