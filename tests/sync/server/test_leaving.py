"""A worker that leaves pushes what its codec has lost: when it may, and what others make of it."""

from __future__ import annotations

import pytest

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.messages import NOTHING, Key, Range
from tests.sync.server.test_coordinator import Bench


def leave(bench: Bench, key: Key, owes: bool = True) -> m.Grant | None:
    """What it is told when it asks for the last time."""
    said = bench.tell(m.Ask(key, owes=owes, leaves=True))
    return next((one for one in said if isinstance(one, m.Grant | m.Finished)), None)


def test_who_is_ahead_leaves_while_nobody_gets_nearer():
    """ssp: there is no text for the slower one."""
    bench = Bench("ssp", workers=2, staleness=0, samples=4)
    bench.coordinator.at.samples.growing = True
    for worker in (0, 1):
        bench.join(worker)
    bench.push(bench.granted(Key(0, 0, 0)))
    assert bench.ask(Key(1, 0, 0)) is None
    grant = leave(bench, Key(0, 0, 1))
    assert grant is not None
    assert grant.rest
    answer = bench.push(grant)
    assert answer is not None
    assert answer.accepted


def test_who_is_ahead_waits_while_others_compute():
    """Else its rest might come later than ssp promises."""
    bench = Bench("ssp", workers=2, staleness=0, samples=8)
    bench.coordinator.at.samples.growing = True
    for worker in (0, 1):
        bench.join(worker)
    bench.push(bench.granted(Key(0, 0, 0)))
    slow = bench.granted(Key(1, 0, 0))
    assert leave(bench, Key(0, 0, 1)) is None
    bench.push(slow)
    assert any(isinstance(said, m.Grant) and said.rest for said in bench.said) or leave(bench, Key(0, 0, 1))


@pytest.mark.parametrize(("workers", "quorum"), [(2, 1), (3, 2)])
def test_a_rest_is_no_gradient_of_a_quorum(workers, quorum):
    """It closes no round, and goes beside as many gradients as without."""
    bench = Bench("quorum", workers=workers, quorum=quorum, grace=0.0)
    for worker in range(workers):
        bench.join(worker)
    others = [bench.granted(Key(worker, 0, 0)) for worker in range(1, workers)]
    rest = leave(bench, Key(0, 0, 0))
    assert rest is not None
    assert rest.rest
    bench.push(rest)
    for grant in others[: quorum - 1]:
        bench.push(grant)
    assert bench.coordinator.version == 0
    bench.push(others[quorum - 1])
    if quorum == 2:
        bench.tell(m.Combined(1, (rest.key, others[0].key, others[1].key), 0, 0, (m.Square("w", 0, 1.0),)))
    else:
        bench.tell(m.Combined(1, (rest.key, others[0].key), 0, 0, (m.Square("w", 0, 1.0),)))
    (committed,) = [record for record in bench.journal if isinstance(record, r.Committed)]
    assert [key.worker for key in committed.keys] == list(range(quorum + 1))
    assert not any(isinstance(record, r.Rejected) for record in bench.journal)


def test_who_has_computed_nothing_leaves_before_the_others_are_there():
    bench = Bench("bsp", workers=2)
    bench.join(0)
    assert leave(bench, Key(0, 0, 0), owes=False) == m.Finished(0, 0)


def test_a_rest_that_was_granted_before_a_crash_is_taken():
    """The grant was not on disk; that of the gradient that it could not pull was."""
    bench = Bench(workers=2)
    for worker in (0, 1):
        bench.join(worker)
    old = bench.granted(Key(0, 0, 0))
    assert old.samples == Range(0, 4)
    bench.push(bench.granted(Key(1, 0, 0)))
    bench.coordinator = bench.make()
    bench.tell(m.Push(old.key, 1, 1.0, 0.0, NOTHING))
    bench.tell(m.Staged(old.key, 0, 0, (m.Square("w", 0, 1.0),)))
    assert [record.keys for record in bench.journal if isinstance(record, r.Committed)] == [(Key(1, 0, 0),), (old.key,)]
    assert bench.coordinator.at.samples.lease(4) == Range(0, 4), "others get what it does not compute"


@pytest.mark.parametrize(("rate", "told"), [(0.0, m.Finished), (1.0, m.Grant)])
def test_at_a_rate_of_zero_no_rest_is_asked_for(rate, told):
    bench = Bench(workers=1, samples=4)
    bench.coordinator.rate = lambda used: rate if used == 4 else 1.0
    bench.join(0)
    bench.push(bench.granted(Key(0, 0, 0)))
    (said,) = bench.tell(m.Ask(Key(0, 0, 1), owes=True))
    assert isinstance(said, told)
    assert bench.coordinator.at.members[0].dismissed == (rate == 0.0)
