"""Numbers as people read them: 12,345 · 1.2 GiB · 51.3 GFLOP/s · 2:13."""

from __future__ import annotations

import math

_SI = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_BINARY = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_SMALL = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
UNKNOWN = "–"


def finite(value: float | None) -> bool:
    """False for None (JSON's NaN), NaN and inf."""
    return value is not None and math.isfinite(value)


def number(value: float | None, form: str = ",.0f") -> str:
    """`value` by a format specification; `–` for None, `nan` and `inf` as such."""
    return UNKNOWN if value is None else format(value, form)


def counted(count: int, noun: str) -> str:
    """`1 step`, `12,345 steps`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def si(value: float | None, unit: str) -> str:
    """Three digits and a prefix: si(51.3e9, "FLOP/s") is `51.3 GFLOP/s`."""
    if value is None:
        return UNKNOWN
    prefix, scale = next((p for p in _SI if abs(value) >= p[1]), ("", 1.0))
    return f"{value / scale:.3g} {prefix}{unit}"


def size(count: float | None) -> str:
    """Bytes: `1.2 GiB`."""
    if count is None:
        return UNKNOWN
    unit, scale = next((u for u in _BINARY if count >= u[1]), ("B", 1))
    return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:.0f} {unit}"


def short(seconds: float | None) -> str:
    """A moment: `85.2 µs`, `12.3 ms`, `1.23 s`."""
    if seconds is None:
        return UNKNOWN
    unit, scale = next((u for u in _SMALL if seconds >= u[1]), _SMALL[-1])
    return f"{seconds / scale:.3g} {unit}"


def duration(seconds: float | None) -> str:
    """A while: `0:42`, `2:13`, `1:02:03`, `3 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
