"""Metrics of steps, from what the coordinator hears and from what its journal has."""

from __future__ import annotations

import time
from typing import Any

import pytest

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.messages import NOTHING, Key, Range
from shoal.training.server.rows import Rows


def commit(version: int, worker: int, start: int, late: int = 0, loss: float = 6.0) -> r.Committed:
    key = Key(worker, 0, version)
    return r.Committed(version, (key,), (late,), (3.0,), (Range(start, start + 2),), 1.5, 1.0, 0.1, losses=(loss,))


def push(worker: int, clock: int, *spent: float, incarnation: int = 0) -> m.Push:
    return m.Push(Key(worker, incarnation, clock), 0, 3.0, 6.0, Range(0, 2), m.Spent(*spent))


def grant(worker: int, clock: int) -> r.Granted:
    return r.Granted(Key(worker, 0, clock), 0, Range(0, 2), 1)


def test_a_row_is_of_the_commits_since_the_row_before():
    rows = Rows(4, 0, 2)
    rows.pushed(m.Push(Key(0, 0, 1), 0, 3.0, 6.0, Range(0, 2), m.Spent(0.5, 0.25, 1.0, 10, 20)))
    rows.take(commit(1, 0, 0))
    assert rows.row() is None, "half a step"
    rows.take(r.Rejected(Key(1, 0, 0), 1, 1, "late"))
    rows.take(commit(2, 1, 2, late=1, loss=12.0))
    row = rows.row()
    assert row is not None
    assert (row["step"], row["loss"], row["tokens"], row["version"]) == (1, 18.0 / 6.0, 6, 2)
    assert (row["commits"], row["rejected"], row["staleness"]) == (2, 1, {"0": 1, "1": 1})
    assert (row["compute_s"], row["communication_s"], row["waited_s"]) == (0.125, 0.25, {"0": 0.5})
    assert (row["sent_bytes"], row["received_bytes"], row["memory_gib"]) == (10, 20, 1.0)
    assert rows.row() is None


def test_how_experts_were_used_is_of_all_commits_and_of_no_rejected_gradient():
    """Two layers of two experts, each token in one: 3 tokens of worker 0, 5 of worker 1, and 9 in vain."""
    rows = Rows(4, 0, 2, choices=1)

    def say(worker: int, *layers: tuple[float, ...]) -> None:
        said = push(worker, worker + 1)
        rows.pushed(m.Push(said.key, 0, 3.0, 6.0, said.samples, m.Spent(experts=layers)))

    say(0, (3.0, 0.0, 3.6, 1.0), (2.0, 1.0, 3.0, 0.0))
    rows.take(commit(1, 0, 0))
    say(1, (9.0, 0.0, 90.0, 9.0), (9.0, 0.0, 90.0, 9.0))
    rows.take(r.Rejected(Key(1, 0, 2), 1, 1, "late"))
    say(1, (1.0, 4.0, 5.5, 0.0), (4.0, 1.0, 5.9, 2.0))
    rows.take(commit(2, 1, 2))
    row = rows.row()
    assert row is not None
    found = row["balance_loss"], row["dropped_share"], row["busiest_load"]
    assert found == pytest.approx((18.0 / 16, 3 / 16, 6 / 4))
    rows.take(commit(3, 0, 4))
    rows.take(commit(4, 1, 6))
    after = rows.row()
    assert after is not None
    assert "balance_loss" not in after, "of these nobody has told"


def test_what_is_no_table_of_experts_is_passed_over():
    """Rows of unequal lengths, of a model with other layers or fewer experts, or of none: a worker's mistake, not the
    run's end."""
    rows = Rows(8, 0, 2, choices=1)
    table = ((3.0, 1.0, 4.4, 1.0),)
    told = [((1.0, 2.0, 3.0, 0.0), (1.0,)), ((), ()), ((1.0, 2.0),), table, (*table, (0.0, 9.0, 90.0, 9.0))]
    for clock, layers in enumerate(told, 1):
        rows.pushed(m.Push(Key(0, 0, clock), 0, 3.0, 6.0, Range(0, 2), m.Spent(experts=layers)))
        rows.take(commit(clock, 0, 2 * clock))
    row = rows.row()
    assert row is not None
    assert (row["balance_loss"], row["dropped_share"], row["busiest_load"]) == (1.1, 0.25, 1.5)


def test_rows_of_a_journal_are_those_that_a_coordinator_would_have_told_and_the_next_one_goes_on():
    told = [commit(1, 0, 0), commit(2, 1, 2), commit(3, 0, 4)]
    lived, born = Rows(4, 0, 2), Rows(4, 0, 2)
    rows = []
    for record in told:
        lived.take(record)
        born.take(record)
        rows += [(lived.row(), born.row())]
    assert [pair[0] is None for pair in rows] == [True, False, True]
    for mine, theirs in rows:
        assert repr(mine) == repr(theirs)
    born.take(commit(4, 1, 6))
    row = born.row()
    assert row is not None
    assert (row["step"], row["tokens"], row["commits"]) == (2, 6, 2), "with what was there before the crash"


def test_samples_that_were_skipped_count_as_used():
    rows = Rows(4, 2, 1)
    rows.take(r.Rejected(Key(0, 0, 0), 0, 0, "not finite", Range(2, 4)))
    assert rows.row() is None, "nothing was learned from this step yet"
    rows.take(commit(1, 0, 4))
    row = rows.row()
    assert row is not None
    assert (row["step"], row["commits"], row["rejected"]) == (1, 1, 1)


def test_a_rest_is_an_update_and_no_gradient():
    rows = Rows(4, 0, 2)
    rows.take(commit(1, 0, 0))
    rows.take(commit(2, 0, 2, late=1))
    rows.pushed(m.Push(Key(1, 0, 3), 2, 8.0, 0.0, NOTHING))
    rows.take(r.Committed(3, (Key(1, 0, 3),), (0,), (8.0,), (NOTHING,), 9.0, 1.0, 0.1, losses=(0.0,)))
    row = rows.row()
    assert row is not None
    assert (row["loss"], row["tokens"], row["staleness"], row["grad_norm"]) == (2.0, 6, {"0": 1, "1": 1}, 1.5)
    assert (row["version"], row["commits"], row["waited_s"]) == (3, 3, {})


def test_time_without_anything_to_compute_is_no_steps(monkeypatch):
    now, seconds = [100.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rows = Rows(4, 0, 1)
    rows.pushed(push(0, 1, 0.5, 1.0))
    for version, (waits, computes) in enumerate([(0.0, 2.0), (600.0, 3.0)], 1):
        rows.pause()
        now[0] += waits
        rows.resume()
        now[0] += computes
        rows.take(commit(version, 0, 4 * version - 4, loss=4.0))
        rows.take(commit(version, 0, 4 * version - 2, loss=4.0))
        row = rows.row()
        assert row is not None
        seconds.append(row["seconds"])
    assert seconds == [3.5, 3.0], "the first waited and computed for 1.5 s before anybody heard of it"


def test_a_run_that_goes_on_counts_no_time_in_which_it_waited_for_workers(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rows = Rows(2, 0, 2)
    rows.take(commit(1, 0, 0))
    assert rows.row() is not None, "told before, by the journal"
    rows.live()
    now[0] = 500.0
    rows.pushed(push(0, 2, 0.5, 1.5))
    rows.take(commit(2, 0, 2))
    row = rows.row()
    assert row is not None
    assert row["seconds"] == 2.0


def test_the_first_step_begins_after_a_time_without_anything_to_compute(monkeypatch):
    """The coordinator was started again in it; the worker says that it waited all the time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rows = Rows(4, 0, 1)
    rows.pause()
    now[0] += 600.0
    rows.resume()
    now[0] += 2.0
    rows.pushed(push(0, 1, 601.0, 1.0))
    rows.take(commit(1, 0, 0))
    rows.take(commit(2, 0, 2))
    row = rows.row()
    assert row is not None
    assert row["seconds"] == 2.0


def test_the_first_step_takes_as_long_as_its_first_worker_at_least(monkeypatch):
    """Or it would have waited for more than the whole step."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rows = Rows(2, 0, 1)
    rows.pushed(push(0, 1, 5.0, 1.0, 0.0, 0, 0, 3.0))
    rows.take(commit(1, 0, 0))
    row = rows.row()
    assert row is not None
    assert (row["seconds"], row["waited_s"]) == (9.0, {"0": 5.0})


def test_what_rejected_gradients_have_cost_is_in_the_row():
    """quorum: worker 1 is always too late. What a push says is of the one before it, too, so nothing is left out."""
    rows = Rows(4, 0, 2)
    for version in (1, 2):
        rows.pushed(push(0, version, 0.5, 1.0, 1.0, 10, 20))
        rows.take(commit(version, 0, 2 * version - 2))
        late = push(1, version, 0.25, 3.0, 2.0, 100, 200)
        rows.pushed(late)
        rows.pushed(late)
        rows.take(r.Rejected(Key(1, 0, version), version, 1, "late"))
        rows.pushed(late)
    row = rows.row()
    assert row is not None
    assert (row["sent_bytes"], row["received_bytes"], row["memory_gib"]) == (220, 440, 2.0)
    assert (row["waited_s"], row["communication_s"]) == ({"0": 1.0, "1": 0.5}, 0.75)
    assert (row["compute_s"], row["wasted_s"], row["rejected"], row["lost"]) == (4.0, 6.0, 2, 0)


def test_of_a_rejected_gradient_before_a_crash_nothing_is_known_but_that_it_was():
    rows = Rows(4, 0, 2)
    rows.take(r.Rejected(Key(1, 0, 1), 1, 1, "late"))
    rows.take(commit(1, 0, 0))
    rows.take(commit(2, 0, 2))
    row = rows.row()
    assert row is not None
    assert (row["rejected"], row["wasted_s"], row["waited_s"]) == (1, 0, {})


def gone(*events: m.Push | r.AnyRecord) -> dict[str, Any]:
    """Worker 1 was granted a clock; these events; then, at the latest, comes what is in the row."""
    rows = Rows(4, 0, 2)
    for event in (grant(1, 0), *events, commit(1, 0, 0), commit(2, 0, 2)):
        if isinstance(event, m.Push):
            rows.pushed(event)
        else:
            rows.take(event)
    row = rows.row()
    assert row is not None
    return row


LOST = r.Left(1, 0, "lost")
PUSHED = push(1, 0, 0.25, 3.0, 2.0, 100, 200)


@pytest.mark.parametrize(
    ("events", "lost", "wasted"),
    [
        ([LOST], 1, 0.0),
        ([PUSHED, LOST], 1, 3.0),
        ([LOST, PUSHED, PUSHED], 1, 3.0),
        ([LOST, commit(9, 0, 0), PUSHED, PUSHED], 1, 3.0),
        ([PUSHED, LOST, push(1, 0, 0.0, 7.0, incarnation=1), PUSHED, r.Rejected(Key(1, 1, 0), 1, 1, "late")], 1, 10.0),
        ([r.Left(1, 0, "left")], 0, 0.0),
        ([r.Rejected(Key(1, 0, 0), 1, 1, "late"), LOST], 0, 0.0),
        ([r.Begun((grant(1, 1),)), LOST], 1, 0.0),
        ([commit(0, 1, 0), r.Granted(Key(1, 0, 1), 0, NOTHING, 1), LOST], 0, 0.0),
    ],
    ids=["killed", "after it pushed", "it pushed later", "much later", "and again", "it left", "idle", "bsp", "a rest"],
)
def test_gradients_of_workers_that_are_given_up(events, lost, wasted):
    row = gone(*events)
    assert (row["lost"], row["wasted_s"]) == (lost, wasted)
    assert row["sent_bytes"] == (100 if wasted else 0)


def test_a_gradient_that_was_being_summed_when_its_worker_was_given_up_is_not_lost():
    both = (Key(0, 0, 0), Key(1, 0, 0))
    two = r.Committed(1, both, (0, 0), (3.0, 3.0), (Range(0, 2), Range(2, 4)), 1.5, 1.0, 0.1, losses=(6.0, 6.0))
    rows = Rows(4, 0, 2)
    for event in (grant(1, 0), LOST, two):
        rows.take(event)
        rows.pushed(PUSHED)
    row = rows.row()
    assert row is not None
    assert (row["lost"], row["wasted_s"], row["sent_bytes"]) == (0, 0.0, 100)


def test_how_far_workers_steps_of_their_own_took_them():
    """Pushes of 3 and 4, the mean of squares 12.5; each became an update of norm 1.5. Rejected ones do not count."""
    rows = Rows(4, 0, 2)
    rows.pushed(push(1, 0, 0, 0, 0, 0, 0, 0, 100.0))
    rows.take(r.Rejected(Key(1, 0, 0), 1, 1, "late"))
    for version, drift in ((1, 3.0), (2, 4.0)):
        rows.pushed(push(0, version, 0, 0, 0, 0, 0, 0, drift))
        rows.take(commit(version, 0, 2 * version - 2))
    # A rest is no step.
    rows.take(r.Committed(3, (Key(1, 0, 3),), (0,), (8.0,), (NOTHING,), 9.0, 1.0, 0.1, losses=(0.0,)))
    row = rows.row()
    assert row is not None
    assert (row["outer_drift"], row["outer_common"]) == (12.5**0.5, 1.5)
    for version in (3, 4):
        rows.pushed(push(0, version, 1.0))
        rows.take(commit(version, 0, 2 * version - 2))
    assert "outer_drift" not in (rows.row() or {})


def test_seconds_on_what_was_void_before_it_could_be_pushed():
    rows = Rows(4, 0, 2)
    rows.pushed(push(1, 0, 0.5, 3.0, 2.0, 100, 200, 5.0))
    rows.take(commit(0, 1, 0))
    rows.take(commit(1, 0, 2))
    row = rows.row()
    assert row is not None
    assert (row["compute_s"], row["wasted_s"]) == (4.0, 5.0)
