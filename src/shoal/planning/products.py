"""How long a matrix product takes: the slower of computing and of memory traffic, with a soft corner between them.

Williams et al. 2009, "Roofline". What of the rate is reached goes by shape: tiles that fill whole waves over a device's
units, and rows of whole 16 bytes (NVIDIA, "Matrix Multiplication Background User's Guide").
"""

from __future__ import annotations

import numpy as np

from shoal.planning.constants import DEPTH, WAVE, Rates
from shoal.planning.work import Array, Work

# Rows, columns, and the rate of the main loop against the largest tile's.
_TILES = ((256, 128, 1.0), (128, 128, 0.92), (128, 64, 0.78), (64, 64, 0.62))
_CORNER = 3.0


def corner(one: Array, other: Array, power: float) -> Array:
    """The larger of two times, and somewhat more where they are near each other."""
    most = np.maximum(np.maximum(one, other), 1e-30)
    return most * ((one / most) ** power + (other / most) ** power) ** (1 / power)


def power_of_two(sizes: Array) -> Array:
    """The largest one, up to 64, that divides a size; 1 for one that is not whole."""
    whole = np.round(sizes)
    found = np.ones_like(whole)
    for power in (2, 4, 8, 16, 32, 64):
        found = np.where((np.abs(sizes - whole) < 1e-6) & (whole % power == 0), power, found)
    return found


def aligned(one: Array, other: Array, odd: float, align: float) -> Array:
    """Share of its rate that a product reaches by the length of its operands' rows. These are numbers of features: an
    activation has a row for each token, and so has its gradient. odd, align: the shared constants of these names."""
    power = np.minimum(power_of_two(one), power_of_two(other))
    return np.where(power < 8, odd, (power / 64) ** align)


def filled(m: Array, n: Array, units: Array) -> Array:
    """Share of the units' time that is useful with the best tile: the last wave, and edges, are not full."""
    best = np.zeros(np.broadcast(m, n, units).shape)
    for rows, columns, rate in _TILES:
        for a, b in ((m, n), (n, m)):
            tiles = np.ceil(a / rows) * np.ceil(b / columns)
            waves = np.ceil(tiles / units) * units
            best = np.maximum(best, rate * m * n / (rows * columns) / waves)
    return best


def seconds(work: Work, rates: Rates, rows: Array, m: Array, n: Array, k: Array, low: Array) -> Array:
    """Of an m × k by k × n product. low: 1 where it is in fp8. rows: as of `aligned`."""
    share = filled(m, n, work.units) ** WAVE * k / (k + DEPTH * (1 + low)) * rows
    rate = np.where(low > 0, rates.product_low, rates.product) * rates.speed
    traffic = 2 * (m * k + k * n + m * n) / rates.memory
    return corner(2 * m * n * k / (rate * share), traffic, _CORNER)
