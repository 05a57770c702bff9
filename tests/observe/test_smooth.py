"""The moving average against its defining sum."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.observe.smooth import Smooth

values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50)


@settings(deadline=None)
@given(values, st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_equals_the_weighted_mean(xs, beta):
    smooth = Smooth(beta)
    for x in xs:
        mean = smooth.add(x)
    weights = [beta ** (len(xs) - 1 - i) for i in range(len(xs))]
    # The bound: float64 rounding of 50 additions of values up to 1e3.
    assert mean == pytest.approx(math.fsum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights), abs=1e-9)


def test_a_constant_stays_itself_from_the_first_value():
    """What the bias correction is for; without it the first mean would be 0.8."""
    smooth = Smooth(0.9)
    assert [smooth.add(8.0) for _ in range(3)] == pytest.approx([8.0] * 3)


def test_values_that_are_not_finite_are_left_out():
    smooth = Smooth(0.5)
    assert smooth.add(math.nan) is None
    assert smooth.add(2.0) == 2.0
    assert smooth.add(math.inf) == smooth.add(None) == 2.0
