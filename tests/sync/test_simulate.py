"""Hundreds of random schedules of the simulated server, and mistakes planted in it that the audit must see."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.job.optim import OptimOptions
from shoal.sync.server import grants
from shoal.sync.server import records as r
from shoal.sync.server.coordinator import Coordinator
from shoal.sync.server.copies import Copies
from shoal.sync.server.effects import Send
from shoal.sync.server.messages import Key, Range
from shoal.sync.server.rules import Rules
from shoal.sync.server.shard import ServerShard
from shoal.sync.simulate.audit import exceeded, violations
from shoal.sync.simulate.ledger import Ledgers
from shoal.sync.simulate.machines import Machines
from shoal.sync.simulate.outcome import simulate
from shoal.sync.simulate.scenario import Fault, Scenario
from shoal.sync.simulate.world import World
from tests.sync.schedules import joined, schedule


def wrong(scenario: Scenario, kind: type[Coordinator] = Coordinator) -> list[str]:
    return violations(World(scenario, Ledgers(), kind).run())


@pytest.mark.parametrize("part", range(4))
def test_random_schedules(part):
    for seed in range(100 * part, 100 * part + 100):
        assert wrong(schedule(seed)) == [], f"schedule {seed}"


def test_random_schedules_that_workers_join():
    """In most of them what a worker computed that the job did not begin with is part of an update."""
    took_part = 0
    for seed in range(100):
        world = World(joined(seed), Ledgers()).run()
        assert violations(world) == [], f"schedule {seed}"
        commits = [record for record in world.journal.history if isinstance(record, r.Committed)]
        took_part += any(key.worker >= world.rules.workers for record in commits for key in record.keys)
    assert took_part > 50


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_schedules_that_workers_join(part):
    for seed in range(1000 + 1000 * part, 2000 + 1000 * part):
        assert wrong(joined(seed)) == [], f"schedule {seed}"


def test_a_copy_that_lacks_what_the_others_have_saved_is_refused_until_it_knows():
    """It was behind when the checkpoint was complete; the others and the coordinator died, and the refusal was lost."""
    assert wrong(schedule(21_309)) == []


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(100))
def test_a_hundred_thousand_schedules(part):
    for seed in range(10_000 + 1000 * part, 11_000 + 1000 * part):
        assert wrong(schedule(seed)) == [], f"schedule {seed}"


@settings(max_examples=60, derandomize=True)
@given(
    mode=st.sampled_from(["bsp", "asp", "ssp", "quorum"]),
    workers=st.integers(1, 4),
    staleness=st.integers(0, 2),
    copies=st.integers(1, 2),
    network=st.tuples(st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 3)),
    faults=st.lists(
        st.builds(
            Fault,
            time=st.floats(0, 6),
            role=st.sampled_from(["worker", "shard", "coordinator"]),
            effects=st.integers(0, 12),
            down=st.floats(0.01, 6),
            hang=st.booleans(),
        ),
        max_size=4,
    ),
)
def test_schedules_that_hypothesis_looks_for(mode, workers, staleness, copies, network, faults):
    loss, double, jitter = network
    rules = Rules(mode, workers=workers, staleness=staleness, quorum=(workers + 1) // 2, lease=3.0, clip=0.0)
    speeds = (0.4, 1.0, 2.0, 0.7)[:workers]
    scenario = Scenario(rules, speeds, 2 * workers + 1, shards=2, copies=copies, delay=0.05, patience=2000.0)
    assert wrong(replace(scenario, loss=loss, double=double, jitter=jitter, faults=tuple(faults))) == []


def arriving(seed: int) -> Scenario:
    """A random schedule whose samples come bit by bit, up to long after workers have used up those before."""
    scenario, chance = schedule(seed), random.Random(seed)
    times = sorted(chance.uniform(0.0, 30.0) for _ in range(chance.randint(1, 4)))
    counts = [*sorted(chance.randint(0, scenario.samples) for _ in times[1:]), scenario.samples]
    return replace(scenario, arrivals=tuple(zip(times, counts, strict=True)))


def test_random_schedules_of_samples_that_come_bit_by_bit():
    """Nobody waits for ever where only some got the last samples before a dry spell, in any mode."""
    for seed in range(200):
        assert wrong(arriving(seed)) == [], f"schedule {seed}"


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_schedules_of_samples_that_come_bit_by_bit(part):
    for seed in range(10_000 + 1000 * part, 11_000 + 1000 * part):
        assert wrong(arriving(seed)) == [], f"schedule {seed}"


def test_who_was_there_before_all_processes_were_new_holds_nobody_back():
    before, after = Key(0, 0, 0), [Key(0, 1, clock) for clock in range(3)]
    journal = [r.Opened(""), r.Entered(0, 1, 0, 0, 1), r.Entered(1, 2, 0, 0, 1), r.Granted(before, 0, Range(0, 1), 1)]
    journal += [r.Anew(), r.Entered(0, 3, 1, 0, 1)]
    for i, key in enumerate(after):
        samples = Range(i, i + 1)
        journal += [r.Granted(key, i, samples, 0)]
        journal += [r.Committed(i + 1, (key,), (0,), (1.0,), (samples,), 1.0, 1.0, 0.1)]
    rules = Rules("ssp", workers=2, staleness=0)
    assert list(exceeded(rules, journal)) == []
    assert list(exceeded(rules, [record for record in journal if record != r.Anew()])) != []


def test_a_schedule_is_the_same_every_time():
    one, two = (World(schedule(7), Ledgers()).run() for _ in range(2))
    assert one.journal.records == two.journal.records
    assert one.now == two.now


# Mistakes.


class AnswersBeforeWriting(Coordinator):
    """Workers and shards are told of a commit before it is in the journal."""

    def _done(self):
        return sorted(super()._done(), key=lambda effect: not isinstance(effect, Send))


class DropsWhatIsApplied(Coordinator):
    """A shard is told to forget bytes that it has applied, but would need again after a crash."""

    def _staged(self, copy, message):
        self.at.copies.commit_of = lambda key: None
        super()._staged(copy, message)


class NoFence(Coordinator):
    """A new process of a worker is taken for the old one."""

    def _join(self, message):
        self.at.incarnations.clear()
        super()._join(message)


class OneMore(Coordinator):
    """Both staleness bounds are off by one."""

    def __init__(self, rules, *args, **options):
        late = None if rules.max_staleness is None else rules.max_staleness + 1
        super().__init__(replace(rules, staleness=rules.staleness + 1, max_staleness=late), *args, **options)


class NoTable(Coordinator):
    """The answers to pushes are not kept."""

    def _push(self, member, message):
        member.answer = None
        super()._push(member, message)


class TakesADrySpellForTheEnd(Coordinator):
    """Whoever asks when there is nothing more is told that it is over."""

    def grow(self, samples, growing, now):
        return super().grow(samples, False, now)


def seen(sentence: str, kind: type[Coordinator] = Coordinator, of=schedule) -> bool:
    """In one of 400 schedules the audit, or an assertion of the code, says so. sentence: a regular expression."""
    for seed in range(400):
        try:
            found = wrong(of(seed), kind)
        except AssertionError as error:
            found = [str(error)]
        if re.search(sentence, "; ".join(found)):
            return True
    return False


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (AnswersBeforeWriting, "is lost|was answered in two ways"),
        (DropsWhatIsApplied, "is lost|ends at version"),
        (NoFence, "of different processes|was applied 2 times|before what it was computed from"),
        (OneMore, "commits late, with"),
        (OneMore, "commits late, more than"),
        (OneMore, r"is \d clocks ahead of the slowest"),
        (NoTable, "still wait"),
    ],
)
def test_a_mistake_is_seen(mistake, sentence):
    assert seen(sentence, mistake)


def test_a_dry_spell_taken_for_the_end_is_seen():
    assert seen("samples were used", TakesADrySpellForTheEnd, of=arriving)


def test_an_order_followed_twice_is_seen(monkeypatch):
    apply = ServerShard._apply

    def twice(shard, message):
        if message.version <= shard.version:
            shard.held.applied.append(shard.held.applied[message.version - 1])
        apply(shard, message)

    monkeypatch.setattr(ServerShard, "_apply", twice)
    assert seen("was applied 2 times")


def test_bytes_that_are_only_in_memory_are_missed(monkeypatch):
    make = Machines.shard

    def unlogged(machines, *args):
        shard = make(machines, *args)
        shard.logged = False
        return shard

    monkeypatch.setattr(Machines, "shard", unlogged)
    assert seen("is lost")


def test_a_commit_that_one_copy_alone_has_is_seen(monkeypatch):
    monkeypatch.setattr(Copies, "doubled", True)
    assert seen("was committed with shard . of it in 1 places")


def test_a_shard_that_is_lost_with_all_its_copies_ends_the_run():
    faults = (Fault(3.0, "shard"), Fault(3.5, "shard"))
    scenario = Scenario(Rules("asp", workers=2), (0.5, 0.7), 40, copies=2, faults=faults)
    world = World(scenario, Ledgers()).run()
    assert violations(world) == []
    assert (world.over, world.finished) == ("no copy of shard 0 is left", False)
    later = World(replace(scenario, faults=(faults[0], Fault(4.5, "shard"))), Ledgers()).run()
    assert violations(later) == []
    assert later.finished


def test_a_pull_of_two_versions_is_seen(monkeypatch):
    """Shards that always serve what they have, though a snapshot was asked for."""
    make = Machines.shard

    def torn(machines, *args):
        shard = make(machines, *args)
        shard.pulls.level = "shard"
        return shard

    monkeypatch.setattr(Machines, "shard", torn)
    assert seen("was computed on versions")


def test_the_coordinator_asserts_its_bound(monkeypatch):
    monkeypatch.setattr(Rules, "bound", lambda rules, others: 0)
    assert seen("commits late, more than 0")


@pytest.mark.parametrize("sentence", ["clocks ahead, more than", "clocks ahead of the slowest"])
def test_a_gate_that_lets_everybody_through_is_seen(monkeypatch, sentence):
    """By the coordinator's own assertion; and without that by the audit."""
    monkeypatch.setattr(grants, "may_begin", lambda at: [x for x in at.members.values() if x.asked is not None])
    if sentence == "clocks ahead of the slowest":
        monkeypatch.setattr(grants, "check_clock", lambda at, member: None)
    assert seen(sentence)


# The problem with numbers.


def outcome(mode: str, **options):
    rules = Rules(mode, workers=4, clip=0.0, **options)
    scenario = Scenario(rules, (1.0, 1.0, 1.0, 4.0), 200, shards=2)
    optim = OptimOptions(name="sgd", lr=0.01, schedule="constant", warmup=0.0, weight_decay=0.0)
    return simulate(scenario, optim, 4)


def test_asp_does_not_wait_for_the_slow_worker_and_learns():
    found = outcome("asp")
    assert found.speedup > 2.5
    assert found.outcome.updates == 200
    assert found.bsp.updates == 50
    assert found.bsp.staleness == {0: 200}
    assert sum(found.outcome.staleness.values()) == 200
    assert max(found.outcome.wait) < 0.1
    assert min(found.bsp.wait[:3]) > 0.6
    assert found.outcome.loss < 0.1 * found.outcome.loss_first


def test_bounded_staleness_waits_for_the_slow_worker_and_rejection_wastes():
    assert outcome("ssp", staleness=2).outcome.staleness_max <= 15
    rejecting = outcome("asp", max_staleness=2).outcome
    assert rejecting.staleness_max <= 2
    assert rejecting.rejected > 0
    assert outcome("quorum", quorum=3).outcome.staleness == {0: 200}


def test_the_slow_worker_gets_a_turn():
    """It is late every time; after three rejections the others wait for it once."""
    rules = Rules("asp", workers=3, max_staleness=1, clip=0.0)
    world = World(Scenario(rules, (0.5, 0.5, 4.0), 150, shares=(1, 1, 4)), Ledgers()).run()
    assert world.finished
    assert violations(world) == []
    answers = [answer.accepted for answer, _ in world.seen[2].answers]
    sizes = [
        record.samples.stop - record.samples.start
        for record in world.journal.records
        if isinstance(record, r.Granted) and record.key.worker == 2
    ]
    assert answers[:4] == [False, False, False, True]
    assert sizes[:4] == [4, 4, 2, 2]


def test_every_compensation_trains_and_none_does_nothing():
    """Each is found by its own way into an update: by the coordinator, by what is pulled, by what shards apply."""
    without = outcome("asp").outcome
    losses = {without.loss}
    for compensation in ("rate", "age", "dc", "look-ahead", "delayed-nesterov"):
        found = outcome("asp", compensation=compensation).outcome
        assert found.loss < 0.2 * found.loss_first
        assert found.mode == f"asp {compensation}"
        losses.add(found.loss)
    assert len(losses) == 6, "two of them do the same"
