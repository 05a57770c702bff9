"""The exponential moving average that progress and report show for noisy figures."""

from __future__ import annotations

import math


class Smooth:
    """mean_t = (1 - beta) Σ beta^(t-i) x_i / (1 - beta^t): as Adam corrects it (Kingma & Ba 2015, section 3).

    Uncorrected, the first averages would be drawn towards zero. Values that are not finite are left out.
    """

    def __init__(self, beta: float = 0.9):
        self.beta = beta
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float | None) -> float | None:
        """The average with `value` in it; None before the first finite one."""
        if value is not None and math.isfinite(value):
            self._sum = self.beta * self._sum + (1 - self.beta) * value
            self._weight = self.beta * self._weight + (1 - self.beta)
        return self.mean

    @property
    def mean(self) -> float | None:
        return self._sum / self._weight if self._weight else None
