"""Asynchronous workers event by event: against closed forms, bounds on staleness, and a renewal process."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.planning.asynchrony import Crew, Shared, run

NOTHING = Shared(0.0, 0.0, 0.0)


@pytest.mark.parametrize("shared", [Shared(0.01, 0.02, 0.01, 0.05), Shared(0.3, 0.1, 0.1), Shared(0.1, 0.4, 0.2, 0.1)])
def test_equal_workers_reach_the_bounds_of_operational_analysis(shared):
    """Denning and Buzen 1978: no cycle is shorter than a worker's own way, nor than what the busiest of servers' links
    and memory does for all of them; equal workers reach the larger."""
    workers, updates = 8, 4000
    found = run(Crew(np.ones((1, workers)), shared), updates)
    own = 1 + max(shared.there, shared.own_there) + shared.update + max(shared.back, shared.own_back)
    busiest = workers * max(shared.there, shared.update, shared.back)
    assert found.seconds * workers / updates == pytest.approx(max(own, busiest), rel=0.01)
    assert found.mean_staleness == pytest.approx(workers - 1, abs=0.05)
    assert np.ptp(found.updates) <= 1
    assert sum(found.shares.values()) == pytest.approx(1)


def test_the_slow_one_slows_nobody_unless_there_is_a_bound():
    computing = np.array([[1.0, 1.0, 1.0, 4.0]])
    free = run(Crew(computing, NOTHING), 1300)
    assert free.updates.tolist() == pytest.approx([400, 400, 400, 100], abs=2)
    assert free.shares["ahead"] == 0
    bound = run(Crew(computing, NOTHING, ahead=2), 1200)
    assert bound.updates.max() - bound.updates.min() <= 3
    assert bound.seconds == pytest.approx(1200, rel=0.02)
    assert bound.shares["ahead"] == pytest.approx(3 * 0.75 / 4, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**20), st.booleans())
def test_no_gradient_is_older_than_the_bound(workers, ahead, seed, fails):
    """(W − 1)(2 s + 1), of workers that count on from the slowest when they come back; and nothing is counted twice."""
    rng = np.random.default_rng(seed)
    shared = Shared(*rng.uniform(0, 0.2, 6))
    crew = Crew(rng.uniform(0.1, 3.0, (7, workers)), shared, ahead, mtbf=20.0 if fails else None, restart=2.0)
    found = run(crew, 200, seed)
    assert max(found.staleness) <= (workers - 1) * (2 * ahead + 1)
    assert sum(found.staleness.values()) == found.updates.sum() == 200
    again = run(crew, 200, seed)
    assert (found.seconds, found.failures) == (again.seconds, again.failures)


def test_failures_cost_what_a_renewal_process_says():
    """Cycles of c, each begun again until no failure comes in it: (m + R)(exp(c/m) − 1) in the mean."""
    cycle, mtbf, restart = 1.0, 5.0, 0.7
    found = run(Crew(np.full((1, 3), cycle), NOTHING, mtbf=mtbf, restart=restart), 30_000, seed=1)
    each = (mtbf + restart) * math.expm1(cycle / mtbf)
    assert 3 * found.seconds / 30_000 == pytest.approx(each, rel=0.01)
    assert found.shares["computing"] == pytest.approx(cycle / each, rel=0.01)
    assert found.failures == pytest.approx(30_000 * math.expm1(cycle / mtbf), rel=0.03)


def test_who_is_down_holds_nobody_up():
    """Worker 0 fails for good: with a bound of 0 the others would wait for it."""
    computing = np.array([[1.0, 1.0, 1.0]])
    found = run(Crew(computing, NOTHING, ahead=0, mtbf=200.0, restart=1e9), 600, seed=0)
    assert found.seconds < 1e4
    assert found.failures >= 1
