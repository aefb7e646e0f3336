"""A weight that changes while sampling: a list over the part of the schedule in which the picture acts."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

_HALVINGS = 48


class StepWeights:
    """Values at equal distances from `start` to `end`, straight lines between them; one value is constant.

    Args:
        values: at least one.
        start, end: share of the schedule, 0 to 1, as the host's percentages.
    """

    def __init__(self, values: Sequence[float], start: float, end: float):
        self.values, self.start, self.end = tuple(values), start, end
        self._known: tuple = (None, {})

    def at(self, sampling, sigma: float) -> float:
        """The value at a sigma of the host's `model_sampling`, whose `percent_to_sigma` is turned round by halving."""
        known, found = self._known
        if known is None or known() is not sampling:
            found = {}
            self._known = (weakref.ref(sampling), found)
        if sigma not in found:
            if len(found) > 4096:
                found.clear()
            found[sigma] = self.value(self._share(sampling, sigma))
        return found[sigma]

    def value(self, share: float) -> float:
        """The value at a share of the schedule."""
        last = len(self.values) - 1
        if last == 0 or self.end <= self.start:
            return self.values[0]
        place = min(max((share - self.start) / (self.end - self.start), 0.0), 1.0) * last
        i = min(int(place), last - 1)
        return self.values[i] + (place - i) * (self.values[i + 1] - self.values[i])

    def _share(self, sampling, sigma: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if float(sampling.percent_to_sigma(middle)) >= sigma else (low, middle)
        return low
