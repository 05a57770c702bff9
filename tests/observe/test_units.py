"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from shoal.observe import units


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (units.si(51.34e9, "FLOP/s"), "51.3 GFLOP/s"),
        (units.si(1.41e12, "FLOP/s"), "1.41 TFLOP/s"),
        (units.si(12, "FLOP"), "12 FLOP"),
        (units.si(None, "FLOP"), "–"),
        (units.size(0), "0 B"),
        (units.size(1536), "1.5 KiB"),
        (units.size(1023 * 2**20), "1023 MiB"),
        (units.size(5 * 2**40), "5 TiB"),
        (units.short(85.2e-6), "85.2 µs"),
        (units.short(0.0123), "12.3 ms"),
        (units.short(0), "0 µs"),
        (units.duration(42.4), "0:42"),
        (units.duration(133), "2:13"),
        (units.duration(3723), "1:02:03"),
        (units.duration(100 * 3600), "4 d 4 h"),
        (units.duration(math.inf), "–"),
        (units.number(12345.6), "12,346"),
        (units.number(math.nan, ".3f"), "nan"),
        (units.number(None), "–"),
        (units.percent(0.4123), "41.2 %"),
        (units.counted(1, "step"), "1 step"),
        (units.counted(0, "step"), "0 steps"),
        (units.counted(12345, "token"), "12,345 tokens"),
    ],
)
def test_text(text, wanted):
    assert text == wanted
