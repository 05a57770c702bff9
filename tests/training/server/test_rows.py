"""Metrics of steps, from what the coordinator hears and from what its journal has."""

from __future__ import annotations

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.messages import NOTHING, Key, Range
from shoal.training.server.rows import Rows


def commit(version: int, worker: int, start: int, late: int = 0, loss: float = 6.0) -> r.Committed:
    key = Key(worker, 0, version)
    return r.Committed(version, (key,), (late,), (3.0,), (Range(start, start + 2),), 1.5, 1.0, 0.1, losses=(loss,))


def test_a_row_is_of_the_commits_since_the_row_before():
    rows = Rows(4, 0, 2)
    rows.pushed(m.Push(Key(0, 0, 1), 0, 3.0, 6.0, Range(0, 2), m.Spent(0.5, 0.25, 1.0, 10, 20)))
    rows.committed(commit(1, 0, 0))
    assert rows.row() is None, "half a step"
    rows.rejected(r.Rejected(Key(1, 0, 0), 1, 1, "late"))
    rows.committed(commit(2, 1, 2, late=1, loss=12.0))
    row = rows.row()
    assert row is not None
    assert (row["step"], row["loss"], row["tokens"], row["version"]) == (1, 18.0 / 6.0, 6, 2)
    assert (row["commits"], row["rejected"], row["staleness"]) == (2, 1, {"0": 1, "1": 1})
    assert (row["compute_s"], row["communication_s"], row["waited_s"]) == (0.125, 0.25, {"0": 0.5})
    assert (row["sent_bytes"], row["received_bytes"], row["memory_gib"]) == (10, 20, 1.0)
    assert rows.row() is None


def test_rows_of_a_journal_are_those_that_a_coordinator_would_have_told_and_the_next_one_goes_on():
    told = [commit(1, 0, 0), commit(2, 1, 2), commit(3, 0, 4)]
    lived, born = Rows(4, 0, 2), Rows(4, 0, 2)
    rows = []
    for record in told:
        lived.committed(record)
        born.committed(record)
        rows += [(lived.row(), born.row())]
    assert [pair[0] is None for pair in rows] == [True, False, True]
    for mine, theirs in rows:
        assert repr(mine) == repr(theirs)
    born.committed(commit(4, 1, 6))
    row = born.row()
    assert row is not None
    assert (row["step"], row["tokens"], row["commits"]) == (2, 6, 2), "with what was there before the crash"


def test_samples_that_were_skipped_count_as_used():
    rows = Rows(4, 2, 1)
    rows.rejected(r.Rejected(Key(0, 0, 0), 0, 0, "not finite", Range(2, 4)))
    assert rows.row() is None, "nothing was learned from this step yet"
    rows.committed(commit(1, 0, 4))
    row = rows.row()
    assert row is not None
    assert (row["step"], row["commits"], row["rejected"]) == (1, 1, 1)


def test_a_rest_is_an_update_and_no_gradient():
    rows = Rows(4, 0, 2)
    rows.committed(commit(1, 0, 0))
    rows.committed(commit(2, 0, 2, late=1))
    rows.pushed(m.Push(Key(1, 0, 3), 2, 8.0, 0.0, NOTHING))
    rows.committed(r.Committed(3, (Key(1, 0, 3),), (0,), (8.0,), (NOTHING,), 9.0, 1.0, 0.1, losses=(0.0,)))
    row = rows.row()
    assert row is not None
    assert (row["loss"], row["tokens"], row["staleness"], row["grad_norm"]) == (2.0, 6, {"0": 1, "1": 1}, 1.5)
    assert (row["version"], row["commits"], row["waited_s"]) == (3, 3, {})
