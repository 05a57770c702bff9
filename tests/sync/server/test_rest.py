"""The rest, by hand: when a worker is asked for what it owes, what becomes of it, and when the job is over."""

from __future__ import annotations

import pytest

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.decisions import commit
from shoal.sync.server.messages import NOTHING, Address, Key, Range, Square
from shoal.sync.server.samples import Samples
from shoal.sync.server.worker import Pushed, Worker
from tests.sync.server.test_coordinator import Bench

SHARD = Address("shard")


def bench(mode: str = "asp", workers: int = 2, **options) -> Bench:
    """With so many workers, each of which has asked to begin its first clock and was granted it."""
    made = Bench(mode, workers=workers, codec="int8", **options)
    for worker in range(workers):
        made.join(worker)
    return made


def asked(on: Bench, worker: int, clock: int, owes: bool = True) -> list:
    """What is said when a worker asks."""
    return on.tell(m.Ask(Key(worker, 0, clock), 0, owes))


def grants(said: list) -> list[m.Grant]:
    return [message for message in said if isinstance(message, m.Grant)]


def begun(on: Bench) -> list[m.Grant]:
    """The first grant of each of two workers."""
    said = asked(on, 0, 0, False)
    found = grants(said + asked(on, 1, 0, False))
    assert len(found) == 2
    return found


def drained(on: Bench) -> list:
    return on.do(on.coordinator.drain(on.now))


def applied(on: Bench) -> None:
    on.tell(m.Applied(0, 0, on.coordinator.version), SHARD)


def test_what_is_owed_comes_in_when_nobody_computes_any_more():
    on = bench()
    first, second = begun(on)
    assert on.push(first).accepted
    drained(on)
    assert asked(on, 0, 1) == []
    assert on.push(second).accepted
    rest = asked(on, 1, 1)
    assert rest == [m.Grant(Key(worker, 0, 1), 2, NOTHING) for worker in (0, 1)]
    assert isinstance(on.journal[-1], r.Begun)
    for grant in rest:
        answer = on.push(grant, square=4.0, weight=8.0)
        assert (answer.accepted, answer.staleness) == (True, 0)
        record = on.journal[-1]
        assert (record.keys, record.weights, record.samples) == ((grant.key,), (8.0,), (NOTHING,))
        assert (record.grad_norm, record.staleness) == (0.25, (0,))


def test_with_rounds_all_rests_are_one_update_divided_by_the_tokens_from_which_they_are_left():
    on = bench("bsp", clip=0.0)
    for grant in begun(on):
        on.push(grant)
    on.tell(m.Combined(1, tuple(Key(worker, 0, 0) for worker in (0, 1)), 0, 0, (Square("w", 0, 9.0),)), SHARD)
    drained(on)
    assert asked(on, 1, 1) == []
    rest = asked(on, 0, 1)
    assert rest == [m.Grant(Key(worker, 0, 1), 1, NOTHING) for worker in (0, 1)]
    assert on.push(rest[1], weight=6.0) is None
    assert on.push(rest[0], weight=2.0) is None
    on.tell(m.Combined(2, (rest[0].key, rest[1].key), 0, 0, (Square("w", 0, 16.0),)), SHARD)
    record = on.journal[-1]
    assert (record.version, record.weights, record.grad_norm) == (2, (2.0, 6.0), 0.5)
    assert record.apply().scale == 1 / 8


def test_quorum_waits_for_all_rests():
    on = bench("quorum", quorum=1)
    first, second = begun(on)
    assert on.push(first).accepted
    assert on.push(second).reason == r.LATE
    drained(on)
    asked(on, 0, 1)
    # Its own gradient was rejected, but an earlier one may not have been.
    rest = asked(on, 1, 1)
    assert on.push(rest[0]) is None
    on.push(rest[1])
    assert on.said == [m.Combine(2, (rest[0].key, rest[1].key))]


def test_the_job_is_over_when_all_have_said_that_they_owe_nothing():
    on = bench()
    drained(on)
    assert not on.coordinator.idle
    assert asked(on, 0, 0, False) == [m.Finished(0, 0)]
    assert not on.coordinator.idle
    (rest,) = asked(on, 1, 0)
    on.push(rest)
    assert not on.coordinator.idle
    applied(on)
    assert not on.coordinator.idle
    assert asked(on, 1, 1, False) == [m.Finished(1, 0)]
    # Nobody waits for those that have heard it to leave.
    assert on.coordinator.idle
    assert asked(on, 1, 1, False) == [m.Finished(1, 0)]


@pytest.mark.parametrize("rules", [{"codec": "none"}, {"codec": "int8", "feedback": False}])
def test_without_residuals_nobody_is_asked(rules):
    on = Bench(samples=4, **rules)
    on.join(0)
    assert on.push(on.granted(Key(0, 0, 0))).accepted
    applied(on)
    assert on.coordinator.idle


def test_at_the_end_of_the_samples_as_when_it_is_asked_to_end():
    on = bench(samples=8)
    for grant in begun(on):
        assert on.push(grant).accepted
    assert asked(on, 0, 1) == []
    assert asked(on, 1, 1, False) == [m.Finished(1, 0), m.Grant(Key(0, 0, 1), 2, NOTHING)]
    assert on.coordinator.at.samples.used == 8


def test_one_that_is_lost_is_not_waited_for():
    on = bench()
    begun(on)
    drained(on)
    on.push(m.Grant(Key(0, 0, 0), 0, Range(0, 4)))
    assert asked(on, 0, 1) == []
    on.now = 6.0
    on.tell(m.Heartbeat(0, 0, 0))
    assert grants(on.do(on.coordinator.tick(on.now))) == [m.Grant(Key(0, 0, 1), 1, NOTHING)]


def test_a_repeated_rest_gets_the_recorded_answer_also_after_a_crash():
    on = bench(workers=1)
    assert on.push(on.granted(Key(0, 0, 0))).accepted
    drained(on)
    (rest,) = asked(on, 0, 1)
    on.coordinator = on.make()
    # It does not know that the job was asked to end, but what was granted.
    assert asked(on, 0, 1) == [rest]
    answer = on.push(rest)
    assert answer.accepted
    commits = len(on.journal)
    for again in range(2):
        assert on.push(rest) == answer
        assert len(on.journal) == commits
        if not again:
            on.coordinator = on.make()
    assert asked(on, 0, 2, False) == [m.Grant(Key(0, 0, 2), 2, Range(4, 8))]


def test_a_grant_that_a_crash_forgot_is_taken_from_the_rest_itself():
    on = bench(workers=1)
    assert on.push(on.granted(Key(0, 0, 0))).accepted
    drained(on)
    (rest,) = asked(on, 0, 1)
    del on.journal[-1]
    on.coordinator = on.make()
    assert on.push(rest).accepted
    assert on.coordinator.at.samples.state() == (4, ())


def test_a_rest_in_the_place_of_a_gradient_is_rejected_and_the_other_way_round():
    on = bench()
    first, second = begun(on)
    assert on.push(m.Grant(first.key, first.version, NOTHING)).reason == "not as granted"
    on.push(second)
    drained(on)
    asked(on, 0, 1)
    (rest, _) = asked(on, 1, 1)
    assert on.push(m.Grant(rest.key, rest.version, first.samples)).reason == "not as granted"


def test_what_could_not_be_pulled_goes_back_where_something_is_owed():
    on = bench(workers=1)
    on.granted(Key(0, 0, 0))
    drained(on)
    (rest,) = on.tell(m.Ask(Key(0, 0, 0), 1, True))
    assert (rest.samples, rest.gone) == (NOTHING, 1)
    assert on.coordinator.at.samples.lease(100) == Range(0, 100)


def test_beside_gradients_a_rest_weighs_nothing_of_its_own():
    on = bench("quorum", quorum=2)
    gradient = m.Push(Key(0, 0, 0), 0, 6.0, 12.0, Range(0, 4))
    rest = m.Push(Key(1, 0, 0), 0, 2.0, 0.0, NOTHING)
    record = commit(on.coordinator.at, lambda used: 1.0, (gradient, rest), [Square("w", 0, 36.0)])
    assert (record.weights, record.grad_norm) == ((6.0, 0.0), 1.0)


def test_no_samples_are_claimed_and_used_up_at_any_time():
    samples = Samples(8)
    assert samples.lease(4) == Range(0, 4)
    for _ in range(2):
        assert samples.claim(NOTHING)
        samples.consume(NOTHING)
        samples.consume(Range(0, 4 * (not samples.watermark)))
    assert samples.state() == (4, ())
    assert samples.used == 4


def pushing(owes: bool = True, reason: str = "") -> Worker:
    """A worker of which a gradient was accepted, and whose rest is answered."""
    worker = Worker(0, 4, 1)
    worker.start(7, 0.0)
    worker.handle(m.Joined(0, 7, 0, 0, 0, (0,)), (), 0.0)
    worker.handle(m.Grant(Key(0, 0, 0), 0, Range(0, 4)), (), 0.0)
    worker.handle(m.Pulled(Key(0, 0, 0), 0, 0, ()), (), 0.0)
    worker.push({0: Pushed((), ())}, 1.0, 0.0, 0.0, owes=owes)
    (ask,) = worker.handle(m.Answer(Key(0, 0, 0), not reason, 1, 0, reason), (), 0.0)
    assert ask.message == m.Ask(Key(0, 0, 1), 0, owes and not reason)
    return worker


def test_a_worker_owes_what_is_left_of_accepted_pushes():
    assert not pushing(owes=False).owes
    assert not pushing(reason=r.LATE).owes
    worker = pushing()
    assert worker.handle(m.Grant(Key(0, 0, 1), 1, NOTHING), (), 0.0) == []
    assert worker.state == "computing"
    stage, push, _ = worker.push({0: Pushed((), ())}, 5.0, 0.0, 0.0)
    assert not stage.message.encoded
    assert (push.message.samples, push.message.weight, push.message.version) == (NOTHING, 5.0, 1)
    # Said again, it is the same.
    assert worker.tick(2.0)[0].message == push.message
    (ask,) = worker.handle(m.Answer(Key(0, 0, 1), True, 2, 0), (), 2.0)
    assert ask.message == m.Ask(Key(0, 0, 2), 0, False)


@pytest.mark.parametrize(("reason", "owes"), [(r.LATE, True), ("not finite", False)])
def test_a_rest_that_comes_late_is_owed_still_and_one_that_can_never_be_applied_is_not(reason, owes):
    worker = pushing()
    worker.handle(m.Grant(Key(0, 0, 1), 1, NOTHING), (), 0.0)
    worker.push({0: Pushed((), ())}, 5.0, 0.0, 0.0)
    (ask,) = worker.handle(m.Answer(Key(0, 0, 1), False, 2, 0, reason), (), 0.0)
    assert ask.message.owes is owes


def test_a_worker_that_was_fenced_owes_as_before():
    worker = pushing()
    worker.handle(m.Fenced(0, 0), (), 0.0)
    worker.start(8, 0.0)
    (ask,) = worker.handle(m.Joined(0, 8, 1, 0, 0, (0,)), (), 0.0)
    assert ask.message == m.Ask(Key(0, 1, 0), 0, True)


# One that leaves while the others go on.


def leaving(on: Bench, worker: int, clock: int, owes: bool = True, gone: int = 0) -> list:
    return on.tell(m.Ask(Key(worker, 0, clock), gone, owes, True))


@pytest.mark.parametrize("mode", ["asp", "ssp", "quorum"])
def test_one_that_leaves_pushes_what_it_owes_and_may_go(mode):
    on = bench(mode)
    first, second = begun(on)
    assert on.push(first).accepted
    (rest,) = grants(leaving(on, 0, 1))
    assert rest == m.Grant(Key(0, 0, 1), 1, NOTHING)
    assert not grants(asked(on, 1, 1))
    if mode == "quorum":
        assert on.push(second).reason == r.LATE
    assert on.push(rest, weight=3.0).accepted
    assert on.journal[-1].weights == (3.0,)
    assert leaving(on, 0, 2, False) == [m.Finished(0, 0)]
    on.tell(m.Leave(0, 0))
    if mode != "quorum":
        assert on.push(second).accepted
    assert asked(on, 1, 1)[0].samples.start == (4 if mode == "quorum" else 8)


def test_with_bsp_what_a_leaving_worker_owes_is_in_the_next_update():
    on = bench("bsp", clip=0.0)
    for grant in begun(on):
        on.push(grant)
    on.tell(m.Combined(1, tuple(Key(worker, 0, 0) for worker in (0, 1)), 0, 0, (Square("w", 0, 9.0),)), SHARD)
    assert leaving(on, 0, 1) == []
    rest, gradient = asked(on, 1, 1)
    assert (rest.samples, gradient.samples) == (NOTHING, Range(8, 12))
    on.push(rest, weight=6.0)
    on.push(gradient, weight=4.0)
    on.tell(m.Combined(2, (rest.key, gradient.key), 0, 0, (Square("w", 0, 16.0),)), SHARD)
    assert (on.journal[-1].weights, on.journal[-1].grad_norm) == ((0.0, 4.0), 1.0)
    assert asked(on, 1, 2) == []
    assert leaving(on, 0, 2, False) == [m.Finished(0, 0)]
    assert grants(on.tell(m.Leave(0, 0)))[0].key == Key(1, 0, 2)


@pytest.mark.parametrize("mode", ["asp", "bsp"])
def test_one_that_leaves_and_owes_nothing_goes_at_once(mode):
    on = bench(mode)
    assert leaving(on, 0, 0, False) == [m.Finished(0, 0)]
    assert grants(asked(on, 1, 0, False) + on.tell(m.Leave(0, 0)))[0].samples == Range(0, 4)


def test_a_worker_that_is_to_leave_finishes_what_it_is_at():
    worker = pushing()
    (ask,) = worker.retire(0.0)
    assert ask.message == m.Ask(Key(0, 0, 1), 0, True, True)
    worker = pushing()
    worker.handle(m.Grant(Key(0, 0, 1), 1, Range(4, 8)), (), 0.0)
    assert worker.retire(0.0) == []
    worker.handle(m.Pulled(Key(0, 0, 1), 0, 1, ()), (), 0.0)
    worker.push({0: Pushed((), ())}, 1.0, 0.0, 0.0, owes=True)
    (ask,) = worker.handle(m.Answer(Key(0, 0, 1), True, 2, 0), (), 0.0)
    assert ask.message == m.Ask(Key(0, 0, 2), 0, True, True)
    worker.handle(m.Finished(0, 0), (), 0.0)
    assert worker.state == "finished"
