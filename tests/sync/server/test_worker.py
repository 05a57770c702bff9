"""A worker by hand: what it says, what it says again, and what it does not listen to."""

from __future__ import annotations

import pytest

from shoal.sync.server import messages as m
from shoal.sync.server.messages import COORDINATOR, Address, Key, Piece, Range
from shoal.sync.server.worker import Pushed, Worker

KEY = Key(4, 2, 7)
GRANT = m.Grant(KEY, 5, Range(8, 12))
PIECES = (Piece("a", (0,), (2,)),)


def said(effects) -> list[tuple[Address, m.Message]]:
    return [(effect.to, effect.message) for effect in effects]


def asking() -> Worker:
    worker = Worker(4, share=2, shards=2, model="model", retry=1.0, heartbeat=0.4)
    assert said(worker.start(99, 0.0)) == [(COORDINATOR, m.Join(4, 99, 2, "model", ""))]
    effects = worker.handle(m.Joined(4, 99, 2, 7, 0, (0, 3)), (), 0.0)
    assert said(effects) == [(COORDINATOR, m.Ask(KEY, 0))]
    return worker


def computing() -> Worker:
    worker = asking()
    pulls = said(worker.handle(GRANT, (), 0.0))
    assert pulls[:2] == [(Address("shard", i, copy), m.Pull(KEY, 5)) for i, copy in ((0, 0), (1, 3))]
    for shard in (1, 0):
        assert worker.state == "pulling"
        worker.handle(m.Pulled(KEY, shard, 5, PIECES), (f"weights {shard}",), 0.0)
    assert worker.state == "computing"
    return worker


def pushing() -> Worker:
    worker = computing()
    worker.push({shard: Pushed(PIECES, (f"gradient {shard}",)) for shard in (0, 1)}, 6.0, 1.5, 0.0)
    return worker


def test_a_pull_is_repeated_where_it_was_not_answered():
    worker = asking()
    worker.handle(GRANT, (), 0.0)
    worker.handle(m.Pulled(KEY, 0, 5, PIECES), ("weights",), 0.0)
    assert worker.tick(0.9)[0].message == m.Heartbeat(4, 2, 0)
    assert (Address("shard", 1, 3), m.Pull(KEY, 5)) in said(worker.tick(1.9))
    again = [to for to, message in said(worker.tick(3.9)) if isinstance(message, m.Pull)]
    assert again == [Address("shard", 1, 3)]


def test_what_is_not_answered_is_asked_again_ever_less_often_until_a_connection_breaks():
    worker = asking()

    def asked(begin: int, end: int) -> list[int]:
        return [now for now in range(begin, end) if m.Ask(KEY, 0) in [message for _, message in said(worker.tick(now))]]

    assert asked(1, 32) == [1, 3, 7, 15, 23, 31]
    worker.lost()
    assert asked(32, 34) == [32]
    worker.handle(GRANT, (), 34.0)
    assert (Address("shard", 0, 0), m.Pull(KEY, 5)) in said(worker.tick(35.0)), "another question, and soon again"


def test_a_version_that_is_gone_is_asked_for_anew():
    worker = asking()
    worker.handle(GRANT, (), 0.0)
    worker.handle(m.Pulled(KEY, 0, 5, PIECES), ("old",), 0.0)
    assert said(worker.handle(m.Gone(KEY, 1, 5, 7), (), 0.0)) == [(COORDINATOR, m.Ask(KEY, 1))]
    assert worker.handle(GRANT, (), 0.0) == []
    worker.handle(m.Grant(KEY, 7, Range(8, 12), 1), (), 0.0)
    worker.handle(m.Pulled(KEY, 0, 5, PIECES), ("old",), 0.0)
    assert not worker.pulled
    worker.handle(m.Pulled(KEY, 0, 7, PIECES), ("new",), 0.0)
    assert worker.pulled[0][1] == ("new",)


def test_rows_are_chosen_once_a_grant_and_only_they_are_taken():
    some, worker, asked = (m.Rows(0, b"\x01"),), asking(), []

    def rows(samples: Range) -> dict[int, tuple[m.Rows, ...]] | None:
        asked.append(samples)
        return {0: some} if len(asked) < 3 else None

    worker.rows = rows
    pulls = said(worker.handle(GRANT, (), 0.0))[:2]
    assert [message.rows for _, message in pulls if isinstance(message, m.Pull)] == [some, ()]
    assert said(worker.tick(1.1))[:2] == pulls, "asked again, it is the same question"
    assert asked == [Range(8, 12)]
    assert not worker.whole
    worker.handle(m.Gone(KEY, 1, 5, 7), (), 1.2)
    worker.handle(m.Grant(KEY, 7, Range(8, 12), 1), (), 1.3)
    for wrong in ((), (m.Rows(0, b"\x03"),)):
        worker.handle(m.Pulled(KEY, 0, 7, PIECES, rows=wrong), ("late",), 1.4)
    assert not worker.pulled
    worker.handle(m.Pulled(KEY, 0, 7, PIECES, rows=some), ("rows",), 1.5)
    worker.handle(m.Gone(KEY, 1, 7, 8), (), 1.6)
    worker.handle(m.Grant(KEY, 8, Range(8, 12), 2), (), 1.7)
    worker.handle(m.Pulled(KEY, 0, 8, PIECES, rows=some), ("late",), 1.8)
    assert (worker.whole, worker.pulled) == (True, {}), "everything was asked for this time"
    worker.handle(m.Pulled(KEY, 0, 8, PIECES), ("whole",), 1.9)
    assert worker.pulled[0][1] == ("whole",)


def test_a_push_is_the_same_bytes_until_it_is_answered():
    worker = computing()
    gradients = {shard: Pushed(PIECES, (f"gradient {shard}",)) for shard in (0, 1)}
    first = worker.push(gradients, 6.0, 1.5, 0.0)
    push = m.Push(KEY, 5, 6.0, 1.5, Range(8, 12))
    assert [effect.tensors for effect in first[:2]] == [("gradient 0",), ("gradient 1",)]
    assert (COORDINATOR, push) in said(first)
    assert said(worker.tick(1.0))[0] == (COORDINATOR, push)
    (again,) = worker.handle(m.Missing(KEY, (1,)), (), 1.1)
    assert again == first[1]
    assert worker.handle(m.Missing(KEY, ()), (), 1.1) == []


@pytest.mark.parametrize("accepted", [True, False])
def test_an_answer_ends_the_clock_once(accepted):
    worker, answer = pushing(), m.Answer(KEY, accepted, 6, 0)
    assert said(worker.handle(answer, (), 0.0)) == [(COORDINATOR, m.Ask(Key(4, 2, 8), 0))]
    assert worker.answer == answer
    assert worker.handle(answer, (), 0.0) == []
    assert worker.key == Key(4, 2, 8)


def test_a_shard_that_has_moved_gets_everything_again_at_once():
    worker = pushing()
    (stage,) = worker.handle(m.Primaries(1, (0, 5)), (), 0.0)
    assert (stage.to, stage.tensors) == (Address("shard", 1, 5), ("gradient 1",))
    assert worker.handle(m.Primaries(1, (9, 9)), (), 0.0) == []


def test_a_fenced_worker_says_nothing_until_it_joins_anew():
    worker = computing()
    worker.handle(m.Fenced(4, 1), (), 0.0)
    assert worker.state == "computing", "that was an earlier incarnation"
    worker.handle(m.Fenced(4, 2), (), 0.0)
    assert (worker.state, worker.grant, worker.tick(50.0)) == ("fenced", None, [])
    assert said(worker.start(100, 51.0))[0][1] == m.Join(4, 100, 2, "model", "")
    worker.handle(m.Joined(4, 99, 2, 7, 0, (0, 0)), (), 51.0)
    assert worker.state == "joining", "that was for an earlier process"


def test_a_refusal_and_the_end():
    worker = Worker(4, share=2, shards=2)
    worker.start(1, 0.0)
    worker.handle(m.Refused(1, "worker 4 has another model", "fix it"), (), 0.0)
    assert worker.state == "refused"
    assert worker.refused is not None
    worker = asking()
    worker.handle(m.Finished(4, 2), (), 0.0)
    assert worker.state == "finished"
    assert said(worker.leave(1.0)) == [(COORDINATOR, m.Leave(4, 2))]
