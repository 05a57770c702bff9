"""What of the time is training: closed forms against runs drawn at random, and at the bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shoal.errors import JobError
from shoal.planning import goodput


def drawn(every: float, stall: float, restart: float, mtbf: float, intervals: int = 60_000) -> np.ndarray:
    """Shares of training, checkpoints, lost and restarts of a run whose failures are drawn one after another."""
    rng = np.random.default_rng(5)
    lost = again = 0.0
    for _ in range(intervals):
        while (failed := rng.exponential(mtbf)) < every + stall:
            lost += failed
            while (failed := rng.exponential(mtbf)) < restart:
                again += failed
            again += restart
    parts = np.array([every * intervals, stall * intervals, lost, again])
    return parts / parts.sum()


@pytest.mark.parametrize(
    ("every", "stall", "restart", "mtbf"),
    [(1000.0, 30.0, 300.0, 3600.0), (100.0, 50.0, 100.0, 300.0), (600.0, 5.0, 60.0, 20_000.0)],
)
def test_shares_are_those_of_runs_drawn_at_random(every, stall, restart, mtbf):
    found = goodput.goodput(stall, restart, mtbf, every)
    shares = [found.training, found.checkpoints, found.lost, found.restarts]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx(drawn(every, stall, restart, mtbf), rel=0.03)


@pytest.mark.parametrize("mtbf", [600.0, 10_000.0, 1e7])
def test_no_other_interval_is_better(mtbf):
    best = goodput.goodput(20.0, 100.0, mtbf)
    others = [goodput.goodput(20.0, 100.0, mtbf, best.interval * factor).training for factor in (0.5, 0.8, 1.25, 2)]
    assert best.training > max(others)
    tried = [goodput.goodput(20.0, 100.0, mtbf, every).training for every in np.geomspace(1, 2 * mtbf, 3000)]
    assert best.training == pytest.approx(max(tried), abs=2e-4)
    assert best.interval == pytest.approx(np.geomspace(1, 2 * mtbf, 3000)[np.argmax(tried)], rel=0.01)


def test_rare_failures_are_youngs():
    assert goodput.interval(10.0, 1e9) == pytest.approx(math.sqrt(2 * 10 * 1e9), rel=1e-4)
    # First order: what is lost is half an interval and a restart for each failure.
    found = goodput.goodput(10.0, 300.0, 1e9)
    first = 1 - 10 / found.interval - (found.interval / 2 + 300) / 1e9
    assert 1 - found.training == pytest.approx(1 - first, rel=1e-3)


def test_without_failures_there_are_checkpoints_alone():
    assert goodput.goodput(10.0, 300.0, None, 90.0).training == pytest.approx(0.9)
    assert goodput.goodput(10.0, 300.0, None).training == 1


@pytest.mark.parametrize("ranks", [[(1.0, 2)], [(0.3, 64)], [(1.0, 8), (3.0, 2)], [(1.0, 3), (0.0, 5)], [(2.0, 1)]])
def test_the_slowest_is_that_of_ranks_drawn_at_random(ranks):
    deviations = np.concatenate([np.full(count, deviation) for deviation, count in ranks])
    rng = np.random.default_rng(7)
    found = (rng.standard_normal((100_000, len(deviations))) * deviations).max(axis=1)
    near = 5 * found.std() / math.sqrt(len(found))
    assert goodput.slowest(ranks) == pytest.approx(found.mean(), abs=near)


def test_the_slowest_of_few_is_known_exactly():
    assert goodput.slowest([(1.0, 2)]) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-6)
    assert goodput.slowest([(1.0, 3)]) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-6)
    assert goodput.slowest([(1.0, 1)]) == pytest.approx(0, abs=1e-9)
    assert goodput.slowest([(0.0, 9)]) == 0
    # Of many it comes to √(2 ln n) from below.
    assert 0.85 < goodput.slowest([(1.0, 16384)]) / math.sqrt(2 * math.log(16384)) < 1


def test_days_and_cost():
    assert goodput.days(86400 * 1e6, 1e6, 0.5) == pytest.approx(2)
    assert goodput.cost(10.0, 2.0) == pytest.approx(480)
    assert goodput.cost(None, 2.0) is None


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: goodput.goodput(-1.0, 0.0, 100.0), "stall=-1"),
        (lambda: goodput.goodput(1.0, math.nan, 100.0), "restart=nan"),
        (lambda: goodput.goodput(1.0, 1.0, 0.0), "mtbf=0"),
        (lambda: goodput.goodput(0.0, 1.0, 100.0), "stall=0"),
        (lambda: goodput.goodput(1.0, 1e6, 100.0), "no run would get on"),
        (lambda: goodput.slowest([(-1.0, 2)]), "deviation=-1"),
        (lambda: goodput.slowest([]), "no ranks"),
        (lambda: goodput.days(1e9, 0.0), "tokens_per_second=0"),
        (lambda: goodput.days(1e9, 1.0, 1.5), "training=1.5"),
    ],
)
def test_what_cannot_be_is_refused(call, what):
    with pytest.raises(JobError) as refused:
        call()
    assert what in refused.value.what
    assert refused.value.fix
