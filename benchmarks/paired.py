"""Interleaved blocks of several contenders and the bounds of their ratios (how every speed claim here is made)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

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


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float]:
    """(geometric mean of slow / fast over the paired blocks, its lower one-sided 95 % bound)."""
    logs = [math.log(a / b) for a, b in zip(slow, fast, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), float("nan")
    t = _T95[max(n for n in _T95 if n <= len(logs))]
    return math.exp(mean), math.exp(mean - t * statistics.stdev(logs) / math.sqrt(len(logs)))
