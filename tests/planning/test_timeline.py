"""Simulated pipelines against a slower way to compute the same, drawings, and closed forms; planned for any stages."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.job.layout import SCHEDULES, Layout
from shoal.planning import closed, schedules, timeline
from shoal.planning.schedules import BACKWARD, FORWARD, INPUT, WEIGHT
from shoal.planning.timeline import Seconds, simulate

_PAGE = Path(__file__).parents[2] / "docs" / "pipeline.md"
_PLAIN = ("gpipe", "1f1b", "interleaved", "looped_bfs")


@st.composite
def _cases(draw, names=tuple(SCHEDULES), rounds=4):
    """(schedule, ranks, chunks, micro-batches), in whole rounds; and a source of seconds."""
    name, ranks = draw(st.sampled_from(names)), draw(st.integers(2, 6))
    chunks = draw(st.integers(2, 4)) if name in schedules.LOOPS else SCHEDULES[name]
    micro_batches = ranks * draw(st.integers(2 if name == "dualpipev" else 1, rounds))
    return (name, ranks, chunks, micro_batches), np.random.default_rng(draw(st.integers(0, 2**32)))


def _seconds(rng, stages):
    """Two cases: backward in proportion to forward."""
    parts = rng.uniform(0.3, 2.0, (3, 2, 1))
    return Seconds(*(parts * stages))


def _slowly(case, taken, message, waits):
    """Makespan of the first case: every start is put off until nothing starts too early any more. message: of each
    boundary between two stages."""
    name, ranks, chunks, _ = case
    orders = schedules.orders(*case)
    layout = Layout(pipeline=ranks, schedule=name, stages="+".join("1" * (ranks * chunks)))
    home = {stage: rank for rank in range(ranks) for stage in layout.stages_of(rank)}
    forward, backward, weight = (part[0] for part in taken)
    lasts = {FORWARD: forward, BACKWARD: backward + weight, INPUT: backward, WEIGHT: weight}
    start = {one: 0.0 for order in orders for one in order}

    def ready(one, previous):
        """The earliest second at which this may start, as things stand."""
        found = 0.0
        if previous is not None:
            to = previous.stage + (1 if previous.kind == FORWARD else -1)
            sends = previous.kind != WEIGHT and to in home and home[to] != home[previous.stage]
            found = end(previous) + (message[min(previous.stage, to)] if waits and sends else 0.0)
        came = {FORWARD: (FORWARD, -1), BACKWARD: (None, 1), INPUT: (None, 1)}.get(one.kind)
        if came and one.stage + came[1] in home:
            kinds = (FORWARD,) if came[0] == FORWARD else (BACKWARD, INPUT)
            stage = one.stage + came[1]
            source = next(s for kind in kinds if (s := one._replace(kind=kind, stage=stage)) in start)
            crosses = home[stage] != home[one.stage]
            found = max(found, end(source) + (message[min(stage, one.stage)] if crosses else 0.0))
        return found

    def end(one):
        return start[one] + lasts[one.kind][one.stage]

    moved = True
    while moved:
        moved = False
        for order in orders:
            for previous, one in zip((None, *order), order, strict=False):
                if (earliest := ready(one, previous)) > start[one]:
                    start[one], moved = earliest, True
    return max(end(one) for one in start)


@settings(max_examples=40, deadline=None)
@given(_cases(rounds=2), st.sampled_from([0.0, 0.05, 1.5]), st.booleans())
def test_the_longest_path_is_found(drawn, message, waits):
    case, rng = drawn
    taken = Seconds(*rng.uniform(0.2, 2.0, (3, 2, case[1] * case[2])))
    each = message * rng.uniform(0.5, 2.0, (2, case[1] * case[2] - 1))
    found = simulate(*case, taken, each, waits)
    assert found.seconds[0] == pytest.approx(_slowly(case, taken, each[0], waits), rel=1e-12)
    alike = simulate(*case, taken, message, waits).seconds
    assert (simulate(*case, taken, np.full_like(each, message), waits).seconds == alike).all()


@settings(max_examples=30, deadline=None)
@given(_cases())
def test_events_are_the_order_and_busy_is_what_the_stages_take(drawn):
    case, rng = drawn
    taken = Seconds(*rng.uniform(0.2, 2.0, (3, 2, case[1] * case[2])))
    found = simulate(*case, taken, 0.1)
    events = list(found.events(1))
    for rank, order in enumerate(schedules.orders(*case)):
        mine = [one for one in events if one.rank == rank]
        assert [(one.kind, one.stage, one.micro_batch) for one in mine] == list(order)
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))
        held = [s for s, where in enumerate(schedules.home(*case[:3])) if where == rank]
        assert found.busy[1, rank] == pytest.approx(case[3] * sum(part[1, held].sum() for part in taken))
    assert max(one.end for one in events) == found.seconds[1]
    assert found.bubble[1] == pytest.approx(1 - found.busy[1].sum() / (case[1] * found.seconds[1]))


def test_the_drawing_of_the_page():
    """Two ranks, four micro-batches, forward and backward one second each: a column of the drawing is a second."""
    one = np.ones(2)
    found = simulate("1f1b", 2, 1, 4, Seconds(one, one / 2, one / 2))
    assert found.seconds == [10]
    for rank in range(2):
        cells = ["·"] * 10
        for event in found.events():
            if event.rank == rank:
                cells[int(event.start)] = f"{'FB'[event.kind]}{event.micro_batch}"
        assert [f"rank {rank}", *cells] == next(
            [f"rank {rank}", *line.split()[2:]]
            for line in _PAGE.read_text().splitlines()
            if line.startswith(f"rank {rank}   ") and "F0" in line
        )


@settings(max_examples=60, deadline=None)
@given(_cases((*_PLAIN, "interleaved_zero_bubble"), rounds=6), st.floats(1.0, 4.0))
def test_closed_forms_with_equal_stages_and_a_dearer_last_one(drawn, last):
    case, rng = drawn
    stages = np.ones(case[1] * case[2])
    stages[-1] = 1 if case[0] == "interleaved_zero_bubble" else last
    taken = _seconds(rng, stages)
    found = closed.seconds(*case, taken)
    assert found == pytest.approx(simulate(*case, taken).seconds, rel=1e-10)
    if case[0] in _PLAIN:
        every = np.stack([sum(taken)[:, [h == r for h in schedules.home(*case[:3])]].sum(1) for r in range(case[1])])
        slowest = every.max(0)
        assert case[3] * slowest + closed.bubble(case[2], slowest, every.sum(0)) == pytest.approx(found, rel=1e-10)


@settings(max_examples=40, deadline=None)
@given(_cases(("gpipe", "1f1b"), rounds=6), st.data())
def test_closed_forms_of_one_stage_a_rank_with_one_that_differs(drawn, data):
    case, rng = drawn
    stages = np.ones(case[1])
    stages[data.draw(st.integers(0, case[1] - 1))] = rng.uniform(0.3, 3.0)
    taken = _seconds(rng, stages)
    simulated = simulate(*case, taken).seconds
    assert closed.seconds(*case, taken) == pytest.approx(simulated, rel=1e-10)
    # What a step is costed with is never too low.
    every = sum(taken)
    slowest = every.max(1)
    assert (case[3] * slowest + closed.bubble(1, slowest, every.sum(1)) >= simulated * (1 - 1e-10)).all()


def test_a_dear_first_rank_of_1f1b_waits_for_nobody():
    """What the others take of a micro-batch, 6 seconds, is less than three of its forwards (backwards)."""
    stages = np.array([4.0, 1.0, 1.0, 1.0])
    taken = Seconds(stages, stages / 2, stages / 2)
    assert closed.seconds("1f1b", 4, 1, 8, taken) == simulate("1f1b", 4, 1, 8, taken).seconds == 8 * 8


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_cases(_PLAIN, rounds=6))
def test_closed_forms_with_any_stages(drawn):
    case, rng = drawn
    taken = _seconds(rng, rng.uniform(1.0, 2.0, (2, case[1] * case[2])))
    ratio = closed.seconds(*case, taken) / simulate(*case, taken).seconds
    low, high = {"gpipe": (1e-10, 1e-10), "1f1b": (0.05, 1e-10)}.get(case[0], (0.25, 0.25))
    assert (ratio >= 1 - low).all()
    assert (ratio <= 1 + high).all()


def test_no_closed_form_is_none():
    equal, uneven = (Seconds(*[np.arange(8) * slope + 1.0] * 3) for slope in (0, 1))
    for case in (("zbv", 4, 2, 8), ("dualpipev", 4, 2, 8), ("interleaved", 4, 2, 9), ("interleaved", 4, 2, 2)):
        assert closed.seconds(*case, equal) is None
    assert closed.seconds("interleaved_zero_bubble", 4, 2, 8, uneven) is None
    assert closed.seconds("interleaved_zero_bubble", 4, 2, 8, equal) is not None


@settings(max_examples=30, deadline=None)
@given(_cases(("1f1b", "interleaved"), rounds=6))
def test_messages_that_are_waited_for(drawn):
    case, rng = drawn
    taken, message = _seconds(rng, np.ones(case[1] * case[2])), 1e-4
    none, some = (simulate(*case, taken, m).seconds for m in (0.0, message))
    counted = closed.messages(*(np.array([float(n)]) for n in case[1:]))
    assert (some - none) / message == pytest.approx(np.repeat(counted, 2), rel=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(_cases(rounds=8), st.integers(0, 5), st.sampled_from([0.0, 0.3]), st.booleans())
def test_more_micro_batches_add_alike(drawn, more, message, waits):
    (name, ranks, chunks, micro_batches), rng = drawn
    case = (name, ranks, chunks, micro_batches + (0 if "interleaved" in name else more))
    equal, uneven = (_seconds(rng, rng.uniform(1.0, 1 + width, (2, ranks * chunks))) for width in (0.0, 1.0))
    assert timeline.seconds(*case, equal) == pytest.approx(simulate(*case, equal).seconds, rel=1e-10)
    whole = simulate(*case, uneven, message, waits).seconds
    assert timeline.seconds(*case, uneven, message, waits) == pytest.approx(whole, rel=0.02)


def test_more_micro_batches_than_are_simulated(monkeypatch):
    asked = []
    taken = Seconds(*[np.ones(8)] * 3)
    monkeypatch.setattr(timeline, "simulate", lambda *case: asked.append(case[3]) or simulate(*case))
    timeline.seconds("zbv", 4, 2, 10_001, taken)
    timeline.seconds("interleaved", 4, 2, 10_000, taken)
    assert max(asked) < 16


def test_cases_of_messages_alone():
    """Cases may differ in messages only."""
    taken = Seconds(*[np.ones(4)] * 3)
    found = simulate("gpipe", 4, 1, 4, taken, np.array([0.0, 0.5])).seconds
    assert found == pytest.approx([21.0, 24.0])


def test_the_table_of_the_page():
    """Idle shares and activations that the page says are those of the simulation: 4 ranks, all passes a second."""
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in _PAGE.read_text().splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 5 and line[0] in SCHEDULES and "%" in line[1]}
    assert list(rows) == list(SCHEDULES)
    for name, cells in rows.items():
        chunks = SCHEDULES[name]
        taken = Seconds(*[np.ones(4 * chunks)] * 3)
        idle = [simulate(name, 4, chunks, micro_batches, taken).bubble[0] for micro_batches in (8, 16, 32)]
        kept = [f"{n / chunks:g}" for n in schedules.live(name, 4, chunks, 16)]
        assert cells == [*(f"{100 * share:.1f} %" for share in idle), " · ".join(kept)]
