"""The coordinator by hand: who may join, what is granted, rejected, fenced, and in which order it is said."""

from __future__ import annotations

import pytest

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.coordinator import Coordinator
from shoal.sync.server.effects import Send, Write
from shoal.sync.server.journal import MAGIC, decode, encode
from shoal.sync.server.messages import Address, Key, Range, Square
from shoal.sync.server.rules import Rules
from shoal.sync.server.standing import Standing

WORKER = Address("worker")


def kinds(effects) -> list[type]:
    return [type(effect.what if isinstance(effect, Write) else effect.message) for effect in effects]


class Bench:
    """A coordinator with one shard, and what it said."""

    def __init__(self, mode: str = "asp", copies: int = 1, samples: int | None = 100, **rules):
        self.rules, self.copies, self.total = Rules(mode, **rules), copies, samples
        self.journal: list[r.AnyRecord] = [r.Opened("model")]
        self.now, self.said, self.effects = 0.0, [], []
        self.coordinator = self.make()

    def make(self) -> Coordinator:
        return Coordinator(
            self.rules, lambda used: 1.0, [self.copies], journal=self.journal, samples=self.total, model="model",
            tokenizer="bpe", now=self.now,
        )  # fmt: skip

    def do(self, effects) -> list:
        """What was said, by the order in which it was."""
        self.effects = effects
        self.journal += [effect.what for effect in effects if isinstance(effect, Write)]
        self.said = [effect.message for effect in effects if isinstance(effect, Send)]
        return self.said

    def tell(self, message, sender: Address = WORKER) -> list:
        return self.do(self.coordinator.handle(sender, message, self.now))

    def join(self, worker: int, nonce: int = 0, share: int = 4) -> m.Joined:
        (joined,) = (r for r in self.tell(m.Join(worker, nonce, share, "model", "bpe")) if isinstance(r, m.Joined))
        return joined

    def ask(self, key: Key, gone: int = 0) -> m.Grant | None:
        return next((said for said in self.tell(m.Ask(key, gone)) if isinstance(said, m.Grant)), None)

    def push(self, grant: m.Grant, square: float = 1.0, weight: float = 1.0) -> m.Answer | None:
        self.tell(m.Push(grant.key, grant.version, weight, 0.0, grant.samples))
        answers = [said for said in self.said if isinstance(said, m.Answer)]
        for copy in range(self.copies):
            self.tell(m.Staged(grant.key, 0, copy, (Square("w", 0, square),)))
            answers += [said for said in self.said if isinstance(said, m.Answer)]
        return answers[-1] if answers else None

    def granted(self, key: Key) -> m.Grant:
        grant = self.ask(key)
        assert grant is not None
        return grant


def test_a_worker_of_another_model_or_tokenizer_is_named():
    bench = Bench()
    (refused,) = bench.tell(m.Join(3, 1, 1, "other", "bpe"))
    assert (refused.why, bench.journal[1:]) == ("worker 3 has another model: other instead of model", [])
    (refused,) = bench.tell(m.Join(3, 1, 0, "model", "bpe"))
    assert refused.why == "worker 3 computes 0 micro-batches a gradient"
    (refused,) = bench.tell(m.Join(3, 1, 1, "model", ""))
    assert refused.why == "worker 3 has another tokenizer: none instead of bpe"
    bench.journal[0] = r.Opened("another")
    with pytest.raises(JobError, match="journal of model another, not of model"):
        bench.make()


def test_nothing_begins_before_all_workers_are_there():
    bench = Bench("bsp", workers=2)
    first = bench.join(1)
    assert bench.ask(Key(1, first.incarnation, 0)) is None
    bench.join(0)
    bench.tell(m.Ask(Key(0, 0, 0)))
    grants = [said for said in bench.said if isinstance(said, m.Grant)]
    assert sorted((g.key.worker, g.samples) for g in grants) == [(0, Range(0, 4)), (1, Range(4, 8))]


def test_a_repeated_join_is_the_same_incarnation_and_a_new_process_another():
    bench = Bench(workers=1)
    assert bench.join(0, nonce=5).incarnation == bench.join(0, nonce=5).incarnation == 0
    grant = bench.granted(Key(0, 0, 0))
    assert bench.join(0, nonce=6).incarnation == 1
    assert any(isinstance(said, m.Fenced) for said in bench.said)
    assert bench.tell(m.Push(grant.key, 0, 1.0, 0.0, grant.samples)) == [m.Fenced(0, 0)]
    assert bench.granted(Key(0, 1, 0)).samples == grant.samples


def test_a_commit_is_on_disk_before_anybody_hears_of_it():
    bench = Bench(workers=1)
    bench.join(0)
    grant = bench.granted(Key(0, 0, 0))
    bench.push(grant)
    write, apply, answer = bench.effects[:3]
    assert isinstance(write, Write)
    assert write.durable
    assert isinstance(write.what, r.Committed)
    assert isinstance(apply.message, m.Apply)
    assert answer.message == m.Answer(grant.key, True, 1, 0, "", 1.0, 1.0)


def test_bytes_are_given_up_only_after_the_journal_has_it():
    """Else a crash between the two leaves a push that may be committed, and shards without its bytes."""
    bench = Bench(workers=1, max_staleness=0)
    for worker in (0, 1):
        bench.join(worker)
    early, late = bench.granted(Key(0, 0, 0)), bench.granted(Key(1, 0, 0))
    bench.push(early)
    bench.tell(m.Push(late.key, 0, 1.0, 0.0, late.samples))
    assert kinds(bench.effects) == [r.Rejected, m.Drop, m.Answer]
    bench.granted(Key(1, 0, 1))
    bench.now = 100.0
    given_up = kinds(bench.coordinator.tick(bench.now))
    assert given_up.index(r.Left) < given_up.index(m.Drop)


@pytest.mark.parametrize("mode", ["asp", "bsp"])
def test_nothing_is_committed_that_only_one_copy_has(mode):
    """Of two copies one is lost: what is pushed waits for the new one, and until that has it, too."""
    bench = Bench(mode, workers=1, copies=2)
    bench.join(0)
    grant = bench.granted(Key(0, 0, 0))
    bench.do(bench.coordinator.lost(Address("shard", 0, 0), 0.0))
    bench.tell(m.Push(grant.key, 0, 1.0, 0.0, grant.samples))
    squares = (Square("w", 0, 1.0),)
    bench.tell(m.Staged(grant.key, 0, 1, squares))
    bench.tell(m.Combined(1, (grant.key,), 0, 1, squares))
    assert bench.coordinator.version == 0
    bench.tell(m.Hello(0, 2, 0), Address("shard", 0, 2))
    assert bench.coordinator.version == 0
    bench.tell(m.Staged(grant.key, 0, 2, squares))
    if mode == "bsp":
        assert Send(Address("shard", 0, 2), m.Combine(1, (grant.key,))) in bench.effects
        bench.tell(m.Combined(1, (grant.key,), 0, 2, squares))
    assert bench.coordinator.version == 1


def test_a_copy_that_is_gone_when_the_coordinator_comes_back_is_given_up():
    """No connection with it breaks, since there was none."""
    bench = Bench(workers=1, copies=3)
    bench.join(0)
    bench.coordinator = bench.make()
    bench.tell(m.Hello(0, 1, 0), Address("shard", 0, 1))
    bench.tell(m.Hello(0, 2, 0), Address("shard", 0, 2))
    bench.do(bench.coordinator.tick(4.9))
    assert bench.coordinator.at.copies.of_shard == [(0, 1, 2)]
    bench.now = 5.0
    bench.do(bench.coordinator.tick(5.0))
    assert bench.coordinator.at.copies.of_shard == [(1, 2)]
    assert r.Changed(0, (1, 2)) in bench.journal
    first = Bench(workers=1, copies=2)
    first.do(first.coordinator.tick(49.0))
    assert first.coordinator.at.copies.of_shard == [(0, 1)], "at the beginning they may take their time"
    first.tell(m.Hello(0, 1, 0), Address("shard", 0, 1))
    first.do(first.coordinator.tick(50.0))
    assert first.coordinator.at.copies.of_shard == [(1,)], "one was lost while there was no coordinator"


def test_a_copy_that_was_filled_before_the_last_one_was_lost_takes_its_place():
    bench = Bench(workers=1, copies=2)
    for copy in (1, 0):
        bench.do(bench.coordinator.lost(Address("shard", 0, copy), 0.0))
    assert bench.coordinator.at.copies.of_shard == [(0,)]
    bench.tell(m.Hello(0, 2, 0), Address("shard", 0, 2))
    assert bench.coordinator.at.copies.of_shard == [(2,)], "not behind one that is not there"
    bench.do(bench.coordinator.lost(Address("shard", 0, 2), 0.0))
    for copy in (2, 3):
        bench.tell(m.Hello(0, copy, 0), Address("shard", 0, copy))
    assert bench.coordinator.at.copies.of_shard == [(2, 3)], "it is there again"


def test_of_three_copies_two_are_enough():
    bench = Bench(workers=1, copies=3)
    bench.join(0)
    grant = bench.granted(Key(0, 0, 0))
    bench.do(bench.coordinator.lost(Address("shard", 0, 1), 0.0))
    assert bench.push(grant) is not None


def test_a_push_is_complete_when_the_copy_that_lacks_it_is_lost():
    """At once: the worker, which has been told that it is known, asks ever less often."""
    bench = Bench(workers=1, copies=3)
    bench.join(0)
    grant = bench.granted(Key(0, 0, 0))
    bench.tell(m.Push(grant.key, 0, 1.0, 0.0, grant.samples))
    for copy in (0, 1):
        bench.tell(m.Staged(grant.key, 0, copy, (Square("w", 0, 1.0),)))
    assert bench.coordinator.version == 0
    bench.do(bench.coordinator.lost(Address("shard", 0, 2), 0.0))
    assert bench.coordinator.version == 1


def test_a_retry_gets_the_recorded_answer_also_after_a_crash():
    bench = Bench(workers=1)
    bench.join(0)
    grant = bench.granted(Key(0, 0, 0))
    answer = bench.push(grant)
    again = m.Push(grant.key, grant.version, 1.0, 0.0, grant.samples)
    assert bench.tell(again) == [answer]
    bench.journal, _ = decode(MAGIC + encode(bench.journal))
    bench.coordinator = bench.make()
    assert bench.tell(again) == [answer]
    bench.journal = bench.coordinator.at.summary()
    bench.coordinator = bench.make()
    assert bench.tell(again) == [answer]
    assert bench.coordinator.version == 1


# What a coordinator that was started again is told anew, by workers, by shards and by its clock; or begins with.
SAID_AGAIN = {"until", "broken", "asked", "push", "staged"}
BEGUN_WITH = {"rules", "now", "opened", "draining", "ready", "copies", "members", "samples"}


def lasting(at: Standing) -> dict[str, object]:
    """Everything that must outlive a crash, also what is added to a Standing or a Member one day."""
    own = {name: value for name, value in vars(at).items() if name not in BEGUN_WITH}
    members = {
        number: {name: value for name, value in vars(member).items() if name not in SAID_AGAIN}
        for number, member in at.members.items()
    }
    copies = at.copies
    return own | {"members": members, "samples": vars(at.samples), "copies": (copies.version, copies.of_shard)}


def test_a_summary_stands_for_the_journal():
    """After it, too, a worker that was rejected twice computes half, and has its turn after a third time."""
    bench = Bench("ssp", workers=3, staleness=9, max_staleness=0, copies=2)
    for worker in range(3):
        bench.join(worker)
    bench.join(2, nonce=1)

    def rejected(clock: int) -> None:
        late = bench.granted(Key(1, 0, clock))
        bench.push(bench.granted(Key(0, 0, clock)))
        answer = bench.push(late)
        assert answer is not None
        assert answer.reason == r.LATE

    def goes_on() -> None:
        old = lasting(bench.coordinator.at)
        epoch, replayed = bench.coordinator.at.copies.epoch, bench.make()
        assert lasting(replayed.at) == old, "the journal is all that it goes by"
        bench.journal = bench.coordinator.at.summary()
        bench.coordinator = bench.make()
        assert lasting(bench.coordinator.at) == old
        assert bench.coordinator.at.copies.epoch >= epoch, "or workers would take its next word for an old one"

    for clock in range(3):
        rejected(clock)
        goes_on()
    member = bench.coordinator.at.members[1]
    assert (member.size, member.rejected) == (2, 3)
    bench.granted(Key(2, 1, 0))
    bench.granted(Key(1, 0, 3))
    assert bench.coordinator.at.turn == 1
    goes_on()
    bench.do(bench.coordinator.lost(Address("shard", 0, 0), 0.0))
    goes_on()
    assert bench.coordinator.at.copies.primaries() == (1,)


def test_clipping_is_of_the_mean():
    bench = Bench("quorum", workers=2, quorum=2, clip=0.5)
    for worker in (0, 1):
        bench.join(worker)
    grants = [bench.granted(Key(worker, 0, 0)) for worker in (0, 1)]
    for grant, weight in zip(grants, (3.0, 5.0), strict=True):
        bench.push(grant, square=100.0, weight=weight)
    assert bench.said[-1] == m.Combine(1, (grants[0].key, grants[1].key))
    bench.tell(m.Combined(1, (grants[0].key, grants[1].key), 0, 0, (Square("w", 0, 256.0),)))
    committed = bench.journal[-1]
    assert isinstance(committed, r.Committed)
    assert (committed.grad_norm, committed.clip, committed.apply().scale) == (2.0, 0.25, 0.25 / 8)


@pytest.mark.parametrize(
    ("compensation", "strength", "clip", "lr"),
    [("none", None, 0.25, 1.0), ("rate", None, 0.25, 0.25), ("rate", 2.0, 0.25, 0.0625), ("age", None, 0.125, 1.0)],
)
def test_what_is_three_commits_late_is_clipped_and_made_less_of(compensation, strength, clip, lr):
    """The mean's norm is 4, the largest one is 1: × ¼; age: × ½ besides; rate: lr / 4."""
    bench = Bench(workers=2, clip=1.0, compensation=compensation, strength=strength)
    for worker in (0, 1):
        bench.join(worker)
    late = bench.granted(Key(0, 0, 0))
    for clock in range(3):
        bench.push(bench.granted(Key(1, 0, clock)), square=64.0, weight=2.0)
    bench.push(late, square=64.0, weight=2.0)
    commits = [record for record in bench.journal if isinstance(record, r.Committed)]
    assert [record.staleness for record in commits] == [(0,), (0,), (0,), (3,)]
    assert [(record.grad_norm, record.clip, record.lr) for record in commits[:3]] == [(4.0, 0.25, 1.0)] * 3
    assert (commits[3].grad_norm, commits[3].clip, commits[3].lr) == (4.0, clip, lr)
    assert commits[3].apply() == m.Apply(4, (late.key,), clip / 2, lr, 3)


def test_shards_are_told_whose_weights_to_keep():
    """With dc: of each version, who computes on it when the next one comes; that is on disk before he begins."""
    bench = Bench(workers=3, compensation="dc")
    for worker in range(3):
        bench.join(worker)
    first = bench.granted(Key(0, 0, 0))
    assert [(type(e.what), e.durable) for e in bench.effects if isinstance(e, Write)] == [(r.Granted, True)]
    second = bench.granted(Key(1, 0, 0))
    bench.push(bench.granted(Key(2, 0, 0)))
    bench.push(second)
    bench.push(bench.granted(Key(1, 0, 1)))
    bench.push(first)
    assert [record.holders for record in bench.journal if isinstance(record, r.Committed)] == [(0, 1), (), (), ()]


def test_a_norm_is_added_up_in_the_order_of_names_and_rows():
    """Ones first, they add up to 64; after 2⁵³ each of them is lost."""
    bench = Bench(workers=1, clip=0.0)
    bench.join(0)
    grant = bench.granted(Key(0, 0, 0))
    bench.tell(m.Push(grant.key, 0, 1.0, 0.0, grant.samples))
    ones = tuple(Square("a", row, 1.0) for row in range(64))
    bench.tell(m.Staged(grant.key, 0, 0, (Square("b", 0, 2.0**53), *ones)))
    committed = bench.journal[-1]
    assert isinstance(committed, r.Committed)
    assert committed.grad_norm == (2.0**53 + 64) ** 0.5 != (2.0**53) ** 0.5


def test_late_ones_of_a_quorum_are_rejected_and_their_samples_used_by_the_next():
    bench = Bench("quorum", workers=2, quorum=1, grace=1.0)
    for worker in (0, 1):
        bench.join(worker)
    first, second = bench.granted(Key(0, 0, 0)), bench.granted(Key(1, 0, 0))
    bench.push(first)
    assert bench.coordinator.version == 0
    assert bench.coordinator.alarm == 1.0
    bench.now = 1.0
    bench.do(bench.coordinator.tick(bench.now))
    assert bench.coordinator.version == 1
    answer = bench.push(second)
    assert answer is not None
    assert (answer.accepted, answer.reason, answer.staleness) == (False, r.LATE, 1)
    assert bench.granted(Key(0, 0, 1)).samples == second.samples


def test_grace_begins_anew_where_the_quorum_was_lost():
    bench = Bench("quorum", workers=3, quorum=2, grace=1.0, reconnect=0.1, lease=100.0)
    for worker in (0, 1, 2):
        bench.join(worker)
    grants = [bench.granted(Key(worker, 0, 0)) for worker in (0, 1, 2)]
    for grant in grants[:2]:
        bench.push(grant)
    assert bench.coordinator.alarm == 1.0
    bench.do(bench.coordinator.lost(Address("worker", 1, 0), 0.2))
    bench.now = 0.9
    bench.do(bench.coordinator.tick(bench.now))
    assert bench.coordinator.version == 0
    bench.now = 5.0
    bench.join(3)
    bench.push(grants[2])
    assert bench.coordinator.alarm == 6.0, "another may come within a second"


def test_a_silent_worker_is_fenced_and_its_samples_go_to_others():
    bench = Bench(workers=2, lease=5.0, reconnect=0.5)
    for worker in (0, 1):
        bench.join(worker)
    grant = bench.granted(Key(0, 0, 0))
    bench.now = 4.0
    bench.tell(m.Heartbeat(1, 0, 0))
    bench.now = 5.0
    bench.do(bench.coordinator.tick(5.0))
    assert r.Left(0, 0, "expired") in bench.journal
    assert bench.granted(Key(1, 0, 0)).samples == grant.samples
    bench.do(bench.coordinator.lost(Address("worker", 1, 0), 6.0))
    bench.do(bench.coordinator.tick(6.4))
    assert set(bench.coordinator.at.members) == {1}
    bench.do(bench.coordinator.tick(6.5))
    assert not bench.coordinator.at.members
    assert r.Left(1, 0, "lost") in bench.journal


@pytest.mark.parametrize("mode", ["asp", "bsp"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_begins_anew_waits_for_all_workers_again(mode: str, killed: bool):
    """In bsp, updates are then of all of them, as they were before. killed: the coordinator too, right after that."""
    bench = Bench(mode, workers=2)
    for worker in (0, 1):
        bench.join(worker, nonce=10 + worker)
    bench.tell(m.Ask(Key(0, 0, 0)))
    bench.tell(m.Ask(Key(1, 0, 0)))
    assert len(bench.coordinator.at.members[0].grant.samples) == 2
    bench.journal.append(r.Anew())
    bench.coordinator = bench.make()
    assert not bench.coordinator.at.members
    bench.join(0, nonce=20)
    if killed:
        bench.coordinator = bench.make()
    assert bench.ask(Key(0, 1, 0)) is None, "worker 1 is not there"
    assert bench.tell(m.Ask(Key(1, 0, 0)), Address("worker", 1, 11)) == [m.Fenced(1, 0)]
    bench.join(1, nonce=21)
    bench.tell(m.Ask(Key(1, 1, 0)))
    members = bench.coordinator.at.members
    if mode == "asp":
        bench.granted(Key(0, 1, 0))
    assert sorted(member.grant.samples for member in members.values()) == [Range(0, 4), Range(4, 8)]


def test_a_summary_after_a_run_has_begun_anew_waits_too():
    bench = Bench("bsp", workers=2)
    bench.join(0)
    bench.join(1)
    bench.journal.append(r.Anew())
    bench.journal = bench.make().at.summary()
    bench.coordinator = bench.make()
    bench.join(0, nonce=7)
    assert bench.ask(Key(0, 1, 0)) is None


def test_a_new_copy_takes_the_place_of_one_whose_end_this_coordinator_has_not_seen():
    """It was killed together with the coordinator: nobody's connection has broken."""
    bench = Bench(copies=2)
    bench.join(0)
    bench.do(bench.coordinator.replaced(0, 2, 0.0))
    assert bench.coordinator.at.copies.primaries() == (1,)
    assert bench.journal[-1] == r.Changed(0, (1,))
    assert m.Primaries(1, (1,)) in bench.said
    bench.do(bench.coordinator.replaced(0, 2, 0.5))
    assert not bench.said, "it asks again while it waits"
    bench.tell(m.Hello(0, 2, 0), Address("shard", 0, 2))
    assert bench.coordinator.at.copies.of_shard == [(1, 2)]
    assert bench.coordinator.bare(100.0) is None
    bench.do(bench.coordinator.replaced(7, 2, 0.0))
    assert not bench.effects, "there is no such shard"


def test_a_shard_whose_copies_have_all_been_replaced_has_nothing():
    bench = Bench(copies=2, retry=1.0)
    for copy in (0, 1):
        bench.do(bench.coordinator.lost(Address("shard", 0, copy), 0.0))
    for copy in (2, 3):
        assert bench.coordinator.bare(50.0) is None
        bench.do(bench.coordinator.replaced(0, copy, 3.0))
    assert bench.coordinator.bare(3.9) is None
    assert bench.coordinator.bare(4.0) == 0


def test_a_copy_that_has_got_all_just_before_the_last_one_went_saves_the_shard():
    bench = Bench(copies=2, retry=1.0)
    bench.do(bench.coordinator.lost(Address("shard", 0, 0), 0.0))
    bench.do(bench.coordinator.replaced(0, 2, 1.0))
    bench.do(bench.coordinator.replaced(0, 3, 2.0))
    bench.now = 2.5
    bench.tell(m.Hello(0, 2, 0), Address("shard", 0, 2))
    bench.do(bench.coordinator.replaced(0, 3, 3.0))
    assert bench.coordinator.bare(9.0) is None
    assert bench.coordinator.at.copies.primaries() == (2,)


def test_without_a_time_to_reconnect_a_worker_is_given_up_at_once():
    bench = Bench("ssp", workers=2, staleness=0, reconnect=0.0)
    for worker in (0, 1):
        bench.join(worker)
    bench.push(bench.granted(Key(0, 0, 0)))
    assert bench.ask(Key(0, 0, 1)) is None
    bench.do(bench.coordinator.lost(Address("worker", 1, 0), 0.0))
    assert bench.journal[-2:-1] == [r.Left(1, 0, "lost")]
    assert any(isinstance(said, m.Grant) for said in bench.said), "the slowest is gone"


def test_a_broken_connection_that_comes_back_is_forgiven():
    bench = Bench(workers=1, reconnect=0.5)
    bench.join(0)
    bench.coordinator.lost(Address("worker", 0, 0), 1.0)
    bench.now = 1.3
    bench.tell(m.Heartbeat(0, 0, 0))
    bench.coordinator.tick(3.0)
    assert set(bench.coordinator.at.members) == {0}


def test_a_worker_of_a_round_that_could_not_pull_is_granted_the_same_again():
    """One of its ranks was at another life of a shard. The other worker has pushed and waits for it."""
    bench = Bench("bsp", workers=2)
    for worker in range(2):
        bench.join(worker)
    bench.tell(m.Ask(Key(0, 0, 0)))
    bench.tell(m.Ask(Key(1, 0, 0)))
    first, second = (bench.granted(Key(worker, 0, 0)) for worker in range(2))
    bench.push(second)
    for gone in (1, 2, 3, 4):
        again = bench.ask(first.key, gone=gone)
        assert again == m.Grant(first.key, 0, first.samples, gone), "it would wait for ever, and all others for it"
    bench.push(again)
    assert m.Combine(1, (first.key, second.key)) in bench.said


def test_the_gate_of_ssp():
    bench = Bench("ssp", workers=2, staleness=1)
    for worker in (0, 1):
        bench.join(worker)
    slow = bench.granted(Key(1, 0, 0))
    for clock in range(2):
        bench.push(bench.granted(Key(0, 0, clock)))
    assert bench.ask(Key(0, 0, 2)) is None
    bench.push(slow)
    assert any(isinstance(said, m.Grant) and said.key == Key(0, 0, 2) for said in bench.said)


def test_who_waits_for_text_hears_that_the_coordinator_lives_and_gets_what_comes():
    bench = Bench("bsp", workers=2, samples=8)
    bench.coordinator.at.samples.growing = True
    for worker in (0, 1):
        bench.join(worker)
    bench.tell(m.Ask(Key(0, 0, 0)))
    bench.tell(m.Ask(Key(1, 0, 0)))
    grants = {said.key.worker: said for said in bench.said if isinstance(said, m.Grant)}
    for grant in grants.values():
        bench.tell(m.Push(grant.key, grant.version, 1.0, 0.0, grant.samples))
        bench.tell(m.Staged(grant.key, 0, 0, (Square("w", 0, 1.0),)))
    keys = (grants[0].key, grants[1].key)
    bench.tell(m.Combined(1, keys, 0, 0, (Square("w", 0, 1.0),)))
    assert bench.coordinator.version == 1
    for worker in (0, 1):
        assert bench.tell(m.Ask(Key(worker, 0, 1))) == []
        (echo,) = bench.tell(m.Ask(Key(worker, 0, 1)))
        assert isinstance(echo, m.Primaries)
    assert not bench.coordinator.idle
    said = bench.do(bench.coordinator.grow(16, True, bench.now))
    assert [(one.key.worker, one.samples) for one in said] == [(0, Range(8, 12)), (1, Range(12, 16))]
    assert bench.do(bench.coordinator.drain(bench.now)) == []


def test_a_coordinator_that_comes_back_in_a_dry_spell_waits_on():
    bench = Bench(workers=1, samples=4)
    bench.coordinator.at.samples.growing = True
    bench.join(0)
    bench.push(bench.granted(Key(0, 0, 0)))
    bench.journal, _ = decode(MAGIC + encode(bench.journal))
    bench.coordinator = bench.make()
    bench.coordinator.at.samples.growing = True
    assert bench.ask(Key(0, 0, 1)) is None
    assert not bench.coordinator.idle
    (grant,) = bench.do(bench.coordinator.grow(6, False, bench.now))
    assert grant.samples == Range(4, 6)
    bench.push(grant)
    assert bench.coordinator.at.samples.finished
    assert bench.tell(m.Ask(Key(0, 0, 2))) == [m.Finished(0, 0)]


def test_the_bound_of_ssp_counts_who_has_lived_since():
    """Not all that ever were; also where the grant was lost in a crash, and nobody knows when it was."""
    bench = Bench("ssp", workers=2, staleness=9)
    for worker in (0, 1):
        bench.join(worker)
    grant = bench.granted(Key(0, 0, 0))
    for nonce in (1, 2, 3):
        bench.join(1, nonce)
    assert bench.coordinator.at.members[0].peers == 4
    bench.push(grant)
    bench.join(1, nonce=4)
    bench.coordinator = bench.make()
    for key, samples in ((Key(1, 4, 1), Range(4, 8)), (Key(0, 0, 1), Range(8, 12))):
        bench.tell(m.Push(key, 1, 1.0, 0.0, samples))
    adopted = [record for record in bench.journal if isinstance(record, r.Granted)][1:]
    assert [(grant.key.worker, grant.version, grant.peers) for grant in adopted] == [(1, 1, 1), (0, 1, 2)]


def test_nothing_can_be_learned_from_nan_or_from_no_tokens():
    bench = Bench(workers=1)
    bench.join(0)
    nan, none = float("nan"), "no valid tokens"
    useless = [(nan, 1.0, "not finite"), (0.0, 0.0, none), (1.0, nan, none), (1.0, float("inf"), none)]
    for clock, (square, weight, reason) in enumerate(useless):
        grant = bench.granted(Key(0, 0, clock))
        assert grant.samples == Range(4 * clock, 4 * clock + 4)
        answer = bench.push(grant, square, weight)
        assert answer is not None
        assert answer.reason == reason
    assert bench.coordinator.version == 0
    assert bench.coordinator.at.samples.watermark == 16


def test_a_push_of_other_samples_than_granted_is_rejected_and_of_fewer_is_not():
    bench = Bench(workers=1)
    bench.join(0)
    grant = bench.granted(Key(0, 0, 0))
    bench.tell(m.Push(grant.key, 0, 1.0, 0.0, Range(2, 6)))
    last = bench.journal[-1]
    assert isinstance(last, r.Rejected)
    assert last.reason == "not as granted"
    grant = bench.granted(Key(0, 0, 1))
    bench.tell(m.Push(grant.key, 0, 1.0, 0.0, Range(0, 2)))
    bench.tell(m.Staged(grant.key, 0, 0, (Square("w", 0, 1.0),)))
    assert bench.coordinator.at.samples.watermark == 2
    assert bench.granted(Key(0, 0, 2)).samples == Range(2, 6)


def test_a_shard_of_another_time_is_refused():
    bench = Bench()
    (refused,) = bench.tell(m.Hello(0, 0, 3), Address("shard"))
    assert refused.nonce == 3
    assert refused.why == "shard 0 holds version 3, its journal 0 to 0"
    for shard in (-1, 1):
        (refused,) = bench.tell(m.Hello(shard, 0, 0), Address("shard", shard))
        assert isinstance(refused, m.Refused)


def test_commits_that_everybody_has_on_disk_are_forgotten():
    bench = Bench(workers=1)
    bench.join(0)
    for clock in range(3):
        bench.push(bench.granted(Key(0, 0, clock)))
    copies = bench.coordinator.at.copies
    bench.tell(m.Applied(0, 0, 2))
    copies.forget(3)
    assert (copies.base, len(copies.commits), bench.coordinator.version) == (2, 1, 3)
    assert copies.commit_of(Key(0, 0, 1)) is None
    assert copies.commit_of(Key(0, 0, 2)) is not None


def test_numbers_of_incarnations_are_not_given_out_again_after_a_checkpoint():
    entered = [r.Entered(0, 7, 3, 0, 1), r.Entered(1, 8, 2, 0, 1), r.Left(1, 2, "lost")]
    old = Standing(Rules(workers=2), [1], 100, [r.Opened("x"), *entered], 0.0)
    new = Standing(Rules(workers=2), [1], 100, old.summary(), 0.0)
    assert new.incarnations == old.incarnations == {0: 3, 1: 2}
    assert new.members.keys() == {0}
    assert new.members[0].peers == old.members[0].peers == 1, "the other has lived since this one's clock began"


def test_an_end_that_has_come_nearer_than_what_was_leased_is_no_contradiction():
    """A run is resumed with fewer steps than it had granted."""
    key = Key(0, 0, 0)
    journal = [r.Opened("x"), r.Entered(0, 7, 0, 0, 1), r.Granted(key, 0, Range(0, 8), 0), r.Left(0, 0, "lost")]
    at = Standing(Rules(), [1], 4, journal, 0.0)
    assert not at.samples.finished
    assert at.samples.lease(4) == Range(0, 4)
