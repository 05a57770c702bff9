"""Numbers that tests compare with bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable


def largest(errors: Iterable[float]) -> float:
    """Infinite where one of them is no number, which `max` drops unless it comes first."""
    found = [*errors]
    return max(found) if all(math.isfinite(error) for error in found) else math.inf
