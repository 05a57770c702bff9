"""Interleaved blocks of several contenders and the bounds of their ratios (how every speed claim here is made)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import pairwise

# One-sided 95 % quantiles of Student's t; between entries the smaller count's (larger) value is used.
_T95 = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13, 8: 1.89, 10: 1.83, 15: 1.76, 20: 1.73, 30: 1.70, 60: 1.67}


def interleave(contenders: dict[str, Callable[[], float]], blocks: int) -> dict[str, list[float]]:
    """Seconds of each contender in each block. The order turns from block to block, so that drift hits all alike."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for block in range(blocks):
        shift = block % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(contenders[name]())
    return seconds


def ratio(slow: list[float], fast: list[float], starts: int = 1) -> tuple[float, float]:
    """(geometric mean of slow / fast over the paired blocks, its lower one-sided 95 % bound).

    starts: over how many starts of the processes the blocks were spread, evenly and in order. Blocks of one start have
    its luck in common (where memory lies, which cores): the bound is the lower of that over blocks and that over the
    means of starts.
    """
    logs = [math.log(a / b) for a, b in zip(slow, fast, strict=True)]
    bounds = [_lower(logs)]
    if starts > 1:
        edges = [len(logs) * start // starts for start in range(starts + 1)]
        bounds.append(_lower([statistics.fmean(logs[a:b]) for a, b in pairwise(edges)]))
    return math.exp(statistics.fmean(logs)), math.exp(min(bounds))


def _lower(values: list[float]) -> float:
    """The lower one-sided 95 % bound of their mean."""
    if len(values) < 2:
        return float("nan")
    t = _T95[max(n for n in _T95 if n <= len(values))]
    return statistics.fmean(values) - t * statistics.stdev(values) / math.sqrt(len(values))
