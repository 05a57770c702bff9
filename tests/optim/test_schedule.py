"""Learning rates against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.job.optim import OptimOptions
from shoal.optim.schedule import learning_rate, of_length, open_until, warmup_steps


def test_cosine_at_its_landmarks():
    o = OptimOptions(lr=1.0, schedule="cosine", warmup=0.1, final_lr=0.1)
    rates = [learning_rate(o, s, 101) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)  # warm-up of 10 steps
    assert rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[100] == pytest.approx(0.1)
    assert rates[30] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 20 / 90)))


def test_wsd_at_its_landmarks():
    o = OptimOptions(lr=2.0, schedule="wsd", warmup=0.05, decay=0.2, final_lr=0.0)
    rates = [learning_rate(o, s, 100) for s in range(100)]
    assert rates[4:80] == pytest.approx([2.0] * 76)
    assert rates[89] == pytest.approx(1.0)
    assert rates[99] == 0.0
    assert rates[80] == pytest.approx(2.0 * 19 / 20)


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    steps=st.integers(1, 300),
)
def test_any_schedule_stays_between_zero_and_the_peak(schedule, warmup, decay, final, steps):
    o = OptimOptions(lr=0.5, schedule=schedule, warmup=warmup, decay=decay, final_lr=final)
    rates = [learning_rate(o, s, steps) for s in range(steps)]
    assert all(0 <= r <= 0.5 + 1e-12 for r in rates)
    peak = rates.index(max(rates))
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[peak:]))


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    old=st.integers(1, 3000),
    part=st.floats(0, 1),
    change=st.integers(1, 6000),
)
def test_a_run_may_become_longer_or_shorter_without_changing_the_rates_so_far(
    schedule, warmup, decay, old, part, change
):
    o = OptimOptions(lr=0.5, schedule=schedule, warmup=warmup, decay=decay, final_lr=0.0)
    assert 0 <= open_until(o, old) <= old
    step = round(part * open_until(o, old))
    new = max(step + change, warmup_steps(o, old))
    other = of_length(o, old, new, step)
    other.validate()
    before = [learning_rate(o, s, old) for s in range(step)]
    assert [learning_rate(other, s, new) for s in range(step)] == before
    # Again and again: of what it has become.
    assert of_length(other, new, new, min(step, open_until(other, new))) == other


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.integers(2, 300),
    old=st.integers(1, 300),
    part=st.floats(0, 1),
    change=st.integers(1, 600),
)
def test_a_warm_up_in_steps_is_the_same_in_a_run_of_any_length(schedule, warmup, old, part, change):
    o = OptimOptions(lr=0.5, schedule=schedule, warmup=warmup, decay=0.4)
    o.validate()
    assert warmup_steps(o, old) == warmup
    step = min(old, round(part * open_until(o, old)))
    new = step + change
    other = of_length(o, old, new, step)
    assert other.warmup == warmup
    assert [learning_rate(other, s, new) for s in range(step)] == [learning_rate(o, s, old) for s in range(step)]
    assert learning_rate(o, warmup - 2, old) == pytest.approx(0.5 * (warmup - 1) / warmup)


def test_without_an_end_the_rate_rises_for_so_many_steps_and_stays():
    o = OptimOptions(lr=2.0, schedule="constant", warmup=4)
    assert [learning_rate(o, s, 0) for s in (0, 1, 3, 4, 10**9)] == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_the_length_of_a_run_is_open_for_as_long_as_it_can_be():
    """One step later and the rates so far would be those of a certain length: a bound that is too late is seen."""
    for schedule, last in (("cosine", 11), ("wsd", 60)):
        o = OptimOptions(lr=1.0, schedule=schedule, warmup=0.1, decay=0.4, final_lr=0.0)
        assert open_until(o, 100) == last
        other = of_length(o, 100, 200, last)
        assert learning_rate(o, last, 100) != learning_rate(other, last, 200)


def test_the_decay_keeps_its_share_where_it_has_not_begun():
    o = OptimOptions(lr=1.0, schedule="wsd", warmup=0.1, decay=0.4, final_lr=0.0)
    later = of_length(o, 100, 200, 60)
    assert (open_until(later, 200), later.warmup) == (120, 0.05)
    sooner = of_length(o, 100, 80, 60)
    assert open_until(sooner, 80) == 60
    assert [learning_rate(sooner, s, 80) for s in (60, 69, 79)] == pytest.approx([0.95, 0.5, 0.0])
