"""A worker beyond those of the job: when it is waited for, what it gets, and what others make of it."""

from __future__ import annotations

import pytest

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.messages import Key, Range
from tests.sync.server.test_coordinator import Bench, kinds


def committed(bench: Bench) -> list[r.Committed]:
    return [record for record in bench.journal if isinstance(record, r.Committed)]


def grants(bench: Bench) -> dict[int, m.Grant]:
    """What was said last, by worker."""
    return {said.key.worker: said for said in bench.said if isinstance(said, m.Grant)}


def test_one_more_takes_the_place_of_none_of_the_jobs_own():
    """Neither at the beginning nor when all processes are new."""
    bench = Bench("bsp", workers=2)
    for anew in (False, True):
        if anew:
            bench.journal.append(r.Anew())
            bench.coordinator = bench.make()
        bench.join(0, nonce=1 + anew)
        extra = bench.join(2, nonce=1 + anew)
        assert bench.ask(Key(0, bench.coordinator.at.members[0].incarnation, 0)) is None
        assert bench.ask(Key(2, extra.incarnation, 0)) is None, "worker 1 is not there yet"
    joined = bench.join(1)
    bench.tell(m.Ask(Key(1, joined.incarnation, 0)))
    assert [grant.samples for _, grant in sorted(grants(bench).items())] == [Range(0, 4), Range(4, 8), Range(8, 12)]


def test_bsp_counts_it_from_the_next_whole_update_on():
    bench = Bench("bsp", workers=2)
    for worker in (0, 1):
        bench.join(worker)
    assert bench.ask(Key(0, 0, 0)) is None
    bench.tell(m.Ask(Key(1, 0, 0)))
    first = grants(bench)
    joined = bench.join(2)
    assert (joined.incarnation, joined.clock) == (0, 0)
    assert bench.ask(Key(2, 0, 0)) is None
    for grant in first.values():
        bench.push(grant)
    keys = tuple(grant.key for _, grant in sorted(first.items()))
    bench.tell(m.Combined(1, keys, 0, 0, (m.Square("w", 0, 1.0),)))
    assert [len(record.keys) for record in committed(bench)] == [2]
    bench.tell(m.Ask(Key(0, 0, 1)))
    assert not grants(bench), "worker 1 has not asked"
    bench.tell(m.Ask(Key(1, 0, 1)))
    second = grants(bench)
    assert [(n, grant.version, grant.samples.start) for n, grant in sorted(second.items())] == [
        (0, 1, 8), (1, 1, 12), (2, 1, 16),
    ]  # fmt: skip
    bench.coordinator = bench.make()
    assert bench.coordinator.at.members.keys() == {0, 1, 2}, "also after a crash"
    for _, grant in sorted(second.items()):
        bench.push(grant)
    keys = tuple(grant.key for _, grant in sorted(second.items()))
    bench.tell(m.Combined(2, keys, 0, 0, (m.Square("w", 0, 1.0),)))
    assert [len(record.keys) for record in committed(bench)] == [2, 3]
    assert bench.coordinator.at.samples.used == 20


@pytest.mark.parametrize("workers", [2, 3])
def test_with_ssp_the_bound_grows_when_it_joins(workers):
    """For who computes now, too; it begins at the clock of the slowest, and holds back the others as any."""
    bench = Bench("ssp", workers=workers, staleness=1, samples=1000)
    for worker in range(workers):
        bench.join(worker)
    bench.push(bench.granted(Key(0, 0, 0)))
    slow, members = bench.granted(Key(1, 0, 0)), bench.coordinator.at.members
    assert bench.rules.bound(members[1].peers) == (workers - 1) * 3
    assert bench.join(workers).clock == 0
    assert bench.rules.bound(members[1].peers) == workers * 3
    assert bench.rules.bound(members[workers].peers) == workers * 3
    bench.push(slow)
    for worker in range(2, workers):
        bench.push(bench.granted(Key(worker, 0, 0)))
    bench.push(bench.granted(Key(0, 0, 1)))
    assert bench.ask(Key(0, 0, 2)) is None, "two clocks ahead of the new one"
    bench.push(bench.granted(Key(workers, 0, 0)))
    assert 0 in grants(bench) or bench.ask(Key(0, 0, 2)) is not None


def test_a_quorum_stays_what_it_was():
    bench = Bench("quorum", workers=2, quorum=2)
    for worker in (0, 1, 2):
        bench.join(worker)
    found = [bench.granted(Key(worker, 0, 0)) for worker in (0, 1, 2)]
    for grant in (found[2], found[0]):
        bench.push(grant)
    bench.tell(m.Combined(1, (found[0].key, found[2].key), 0, 0, (m.Square("w", 0, 1.0),)))
    assert [[key.worker for key in record.keys] for record in committed(bench)] == [[0, 2]]
    assert not bench.push(found[1]).accepted


def test_with_asp_it_begins_at_once_at_the_newest_version():
    bench = Bench("asp", workers=1)
    bench.join(0)
    bench.push(bench.granted(Key(0, 0, 0)))
    assert bench.join(1, share=2).clock == 1, "that of the slowest"
    grant = bench.granted(Key(1, 0, 1))
    assert (grant.version, grant.samples) == (1, Range(4, 6))
    assert bench.push(grant).accepted


def test_when_it_leaves_its_samples_go_to_others_and_its_number_can_be_taken_again():
    bench = Bench("bsp", workers=1)
    bench.join(0)
    bench.join(1)
    bench.tell(m.Ask(Key(0, 0, 0)))
    bench.tell(m.Ask(Key(1, 0, 0)))
    assert grants(bench)[1].samples == Range(4, 8)
    bench.tell(m.Leave(1, 0))
    assert r.Left in kinds(bench.effects)
    bench.push(m.Grant(Key(0, 0, 0), 0, Range(0, 4)))
    assert [len(record.keys) for record in committed(bench)] == [1]
    assert bench.granted(Key(0, 0, 1)).samples == Range(4, 8)
    assert bench.join(1, nonce=9).incarnation == 1
