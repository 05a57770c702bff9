"""A simulated run against closed forms, a slower simulation of the same, and what cannot be otherwise."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.observe import perfetto
from shoal.observe.timeline import summary
from shoal.planning import pictured, simulation
from shoal.planning.simulation import Failures, Scene
from shoal.planning.timeline import Seconds


def scene(ranks=4, micro_batches=8, pipelines=3, **more):
    one = np.ones(ranks)
    given = {"exchange": 0.5, "optimizer": 0.25} | more
    return Scene("1f1b", ranks, 1, micro_batches, Seconds(one, one, one), pipelines=pipelines, **given)


def test_equal_devices_take_the_closed_form():
    """M micro-batches of 3 s, the bubble of 1F1B, (p - 1) of them more, and what comes after."""
    found = simulation.run(scene(), steps=5)
    assert found.seconds == pytest.approx(5 * ((8 + 3) * 3 + 0.75), rel=1e-12)
    assert found.goodput == pytest.approx(1)
    assert not found.failures
    assert np.ptp(found.steps) == 0


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**20), st.floats(0, 0.3), st.floats(0, 0.3))
@settings(max_examples=25, deadline=None)
def test_parts_add_up_and_the_slowest_decides(ranks, pipelines, seed, spread, jitter):
    given_ = scene(ranks, 8, pipelines, spread=spread, jitter=jitter, slow={(pipelines - 1, 0): 1.5})
    failures = Failures(mtbf=400.0, restart=20.0, every=3, stall=2.0)
    found = simulation.run(given_, 12, failures, seed)
    assert sum(found.parts.values()) == pytest.approx(found.seconds, rel=1e-9)
    assert found.seconds == pytest.approx(simulation.run(given_, 12, failures, seed).seconds, rel=1e-15)
    # One rank that takes half as long again: all of its micro-batches, if it is the only one that differs.
    if not (spread or jitter):
        assert found.steps.min() >= 8 * 3 * 1.5


def test_a_slow_rank_costs_what_a_slower_simulation_says():
    """Every start put off until nothing starts too early, as one event after another (heap), of 1F1B."""
    times = {(1, 2): 1.7, (0, 0): 1.1}
    found = simulation.run(scene(slow=times), steps=1)
    assert found.seconds - 0.75 == pytest.approx(max(_by_events(scene(), times, p) for p in range(3)), rel=1e-12)


def _by_events(one: Scene, times: dict[tuple[int, int], float], pipeline: int) -> float:
    """1F1B by events: a rank takes its next operation when it is free and what the operation needs is there."""
    p, m = one.ranks, one.micro_batches
    orders = []
    for rank in range(p):
        ahead = min(p - 1 - rank, m)
        order = [("f", i) for i in range(ahead)]
        for i in range(m):
            order += [("f", i + ahead)] * (i + ahead < m) + [("b", i)]
        orders.append(order)
    done: dict[tuple[str, int, int], float] = {}
    at, ends = [0] * p, [(0.0, rank) for rank in range(p)]
    heapq.heapify(ends)
    last, stuck = 0.0, []
    while ends:
        now, rank = heapq.heappop(ends)
        if at[rank] == len(orders[rank]):
            continue
        kind, i = orders[rank][at[rank]]
        source = (
            ("f", rank - 1, i) if kind == "f" and rank else ("b", rank + 1, i) if kind == "b" and rank < p - 1 else 0
        )
        if source and source not in done:
            stuck.append((now, rank))
            continue
        start = max(now, done[source] if source else 0.0)
        end = start + (1 if kind == "f" else 2) * times.get((pipeline, rank), 1.0)
        done[kind, rank, i] = end
        at[rank], last = at[rank] + 1, max(last, end)
        for waiting in [(end, rank), *stuck]:
            heapq.heappush(ends, waiting)
        stuck = []
    return last


def test_stragglers_cost_the_expected_maximum():
    """4,096 devices, each step the slowest of them: the mean of the maximum of normals, by numerical integration."""
    sigma, count = 0.02, 4096
    alone = Scene("gpipe", 1, 1, 1, Seconds([1.0], [0.0], [0.0]), pipelines=count, jitter=sigma)
    found = simulation.run(alone, 400, seed=3).steps
    x = np.linspace(-8, 8, 40001)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x]) ** count
    mean = float((np.exp(sigma * x)[1:] * np.diff(below)).sum())
    assert found.mean() == pytest.approx(mean, abs=4 * found.std() / math.sqrt(len(found)))
    # Devices of an actor are as many chances to be slow as actors.
    together = Scene("gpipe", 1, 1, 1, Seconds([1.0], [0.0], [0.0]), pipelines=512, devices=8, jitter=sigma)
    same = simulation.run(together, 400, seed=4).steps
    assert same.mean() == pytest.approx(mean, abs=4 * same.std() / math.sqrt(len(same)))


def test_failures_cost_what_a_renewal_process_says():
    """Daly 2006: between checkpoints a run has segments of w seconds that must come through. With failures at rate r
    and d seconds until a restart has come through, each takes (1/r + d) (e^(r w) - 1) in the mean."""
    segment, rate, restart, stall = 10.0, 1 / 40.0, 25.0, 5.0
    alone = Scene("gpipe", 1, 1, 1, Seconds([1.0], [0.0], [0.0]))
    steps = 20_000
    found = simulation.run(alone, steps, Failures(1 / rate, restart, every=10, stall=stall), seed=5)
    again = (math.exp(rate * restart) - 1) / rate
    each = (1 / rate + again) * (math.exp(rate * (segment + stall)) - 1)
    assert found.seconds == pytest.approx(steps / 10 * each, rel=0.03)
    assert len(found.failures) == pytest.approx(found.seconds * rate, rel=0.06)
    assert all(failure.lost >= 0 for failure in found.failures)
    assert all(one.at < other.at for one, other in zip(found.failures, found.failures[1:], strict=False))
    assert found.parts["work"] == steps
    assert found.parts["checkpoints"] == stall * (steps / 10 - 1)  # none after the last step
    assert found.parts["stragglers"] == pytest.approx(0, abs=1e-6)


def test_a_run_that_cannot_get_on_is_given_up():
    alone = Scene("gpipe", 1, 1, 1, Seconds([1.0], [0.0], [0.0]))
    with pytest.raises(JobError, match="leaves no time for all steps"):
        simulation.run(alone, 500, Failures(mtbf=2.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slow": {(3, 0): 2.0}}, "no rank 0 of pipeline 3"),
        ({"slow": {(0, 0): 0.0}}, "slow of rank 0 of pipeline 0"),
        ({"jitter": -0.1}, "jitter"),
        ({"pipelines": 0}, "pipelines"),
        ({"message": float("nan")}, "message"),
    ],
)
def test_what_cannot_be(change, words):
    with pytest.raises(JobError, match=words):
        simulation.run(scene(**change), 1)


def test_too_long_to_simulate():
    with pytest.raises(JobError, match="too many to simulate") as caught:
        simulation.run(scene(pipelines=100_000, jitter=0.1), 1000)
    assert "25 steps or less" in str(caught.value.fix)


def test_the_picture_is_the_first_step(tmp_path):
    """Every rank ends when the last one does; shares are those of the closed form; the file can be read back."""
    one = scene(ranks=4, micro_batches=8, pipelines=2, slow={(1, 1): 1.25})
    drawn = pictured.recordings(one, simulation.picture(one), range(2))
    assert [r.rank for r in drawn] == list(range(8))
    first = simulation.run(one, 1).seconds
    assert all(r.spans[-1].end == round(first * 1e9) for r in drawn)
    shares = summary(drawn)
    computed = [8 * 3 * (1.25 if rank == 5 else 1) + 0.25 for rank in range(8)]
    assert [share.compute for share in shares] == pytest.approx(computed)
    assert [share.exposed for share in shares] == pytest.approx([0.5] * 8)
    assert all(a.end == b.start for r in drawn for a, b in zip(r.spans, r.spans[1:], strict=False))
    perfetto.write(tmp_path / "trace.json", drawn)
    assert [len(r.spans) for r in perfetto.read(tmp_path / "trace.json")] == [len(r.spans) for r in drawn]
