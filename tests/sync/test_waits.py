"""Who waits for whom: a replica that is slow on purpose; what a rank tells by hand; bytes to other replicas."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from shoal.job import Layout
from shoal.mesh import Mesh
from shoal.sync.waits import Heard, Waits

LOCAL = {"name": "local", "every": 2}
GOSSIP = {"name": "gossip", "every": 1}
# Seconds that the slow one sleeps in a step: more than a busy machine holds another one up in most of them.
PAUSE = 0.25


def seat(layout: str, rank: int) -> Mesh:
    parsed = Layout.parse(layout)
    replica = rank // parsed.ranks_per_replica
    return cast(Mesh, SimpleNamespace(layout=parsed, rank=rank, replica=replica, device=torch.device("cpu")))


def summed(told: list[tuple[float, ...]]) -> list[float]:
    return [sum(seconds) for seconds in zip(*(each for each in told if each), strict=True)]


@pytest.mark.parametrize(
    ("layout", "sync", "steps", "slow", "at"),
    [
        ("replicas=3,micro_batch=2", {"name": "allreduce"}, 5, 1, 0),
        pytest.param(
            "replicas=2,fsdp=2,micro_batch=3",
            {"name": "allreduce", "codec": "bf16"},
            5,
            1,
            0,
            marks=pytest.mark.nightly,
        ),
        pytest.param("replicas=3,micro_batch=2", LOCAL, 6, 2, 0, marks=pytest.mark.nightly),
        ("replicas=2,fsdp=2,micro_batch=3", LOCAL | {"delay": 1, "fragments": 2}, 6, 2, 0),
        # When all has arrived: what is waited for then is told with the next exchange.
        ("replicas=2,micro_batch=3", LOCAL | {"every": 4, "delay": 2}, 8, 1, 4),
    ],
    ids=["allreduce", "allreduce fsdp", "local", "local fsdp", "local once"],
)
def test_all_others_wait_for_a_slow_replica(ranks, layout, sync, steps, slow, at):
    parsed, seconds = Layout.parse(layout), 3 * PAUSE if at else PAUSE
    how = {"layout": layout, "sync": sync, "steps": steps, "slow": slow, "at": at}
    told = ranks.run("tests.sync.waits_cases:waits", parsed.world, seconds=seconds, **how)
    assert all(one == told[0] for one in told), "ranks have heard different things"
    assert all(len(each) == parsed.replicas and min(each) == 0 for each in told[0] if each)
    waited, slowest = summed(told[0]), slow // parsed.ranks_per_replica
    assert waited.pop(slowest) < min(waited)


def test_all_reduce_tells_with_the_next_step_and_local_steps_with_the_exchange(ranks):
    how = {"steps": 4, "slow": 1, "seconds": 0.0, "layout": "replicas=2,micro_batch=3"}
    each = ranks.run("tests.sync.waits_cases:waits", 2, sync={"name": "allreduce"}, **how)
    outer = ranks.run("tests.sync.waits_cases:waits", 2, sync=LOCAL, **how)
    assert [bool(waits) for waits in each[0]] == [False, True, True, True]
    assert [bool(waits) for waits in outer[0]] == [False, True, False, True]


def test_in_pairs_everybody_hears_who_was_waited_for(ranks):
    """Four replicas: those that meet the slow one wait, the others hear of it in later meetings, all at the end."""
    told = ranks.run(
        "tests.sync.waits_cases:waits",
        4,
        layout="replicas=4,micro_batch=3",
        sync=GOSSIP,
        steps=7,
        slow=2,
        seconds=PAUSE,
    )
    waited = [summed(one) for one in told]
    assert all(one == pytest.approx(waited[0]) for one in waited)
    assert min(range(4), key=waited[0].__getitem__) == 2
    assert max(waited[0]) > PAUSE / 5
    # Before the last step, in which all take part, some had heard of replicas that they had not met.
    assert all(sum(1 for seconds in summed(one[:-1]) if seconds) == 4 for one in told)


def test_the_last_step_tells_of_all_where_one_had_no_partner(ranks):
    """Three replicas that meet once: one of them waits for nobody."""
    told = ranks.run(
        "tests.sync.waits_cases:waits", 3, layout="replicas=3,micro_batch=2", sync=GOSSIP, steps=2, slow=1, seconds=0.0
    )
    assert not any(one[0] for one in told)
    assert all(one[1] == pytest.approx(told[0][1]) for one in told)
    assert sum(1 for seconds in told[0][1] if seconds) == 2


def test_the_mean_over_a_replicas_ranks_beyond_the_least(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 3.0, 10.0, 11.0, 20.0, 21.0, 30.0, 35.0])
    monkeypatch.setattr("shoal.sync.waits.time", SimpleNamespace(perf_counter=lambda: next(now)))
    ranks = [Waits(seat("replicas=2,fsdp=2", rank)) for rank in range(4)]
    for one in ranks:
        cast(Any, one)._mesh.wait = lambda work: None
        one.wait(cast(Any, None))
    totals = torch.stack([one.own() for one in ranks]).sum(0).tolist()
    assert totals == [2.0, 3.0]
    assert ranks[0].news() == ()
    ranks[0].hear(totals)
    ranks[0].hear([0.0, 1.0])
    assert ranks[0].news() == (0.0, 2.0)
    assert ranks[0].news() == ()
    assert ranks[0].own().tolist() == [0.0, 0.0], "told once"
    alone = Waits(seat("replicas=1", 0))
    assert len(alone.own()) == 0
    alone.hear([])
    assert alone.news() == ()


def test_what_is_heard_in_pairs_is_the_newest_of_each():
    ones = [Heard(seat("replicas=3", rank)) for rank in range(3)]
    for rank, seconds in enumerate((1.0, 2.0, 4.0)):
        ones[rank].add(seconds)
    old = ones[1].known_R.clone()
    ones[1].add(8.0)
    ones[2].hear(ones[1].known_R)
    ones[2].hear(old)
    assert ones[2].known_R.tolist() == [0.0, 10.0, 4.0]
    assert ones[2].news() == (), "of the first replica nothing is known: it may wait more than any other"
    everybody = torch.stack([one.own() for one in ones]).sum(0)
    assert everybody.tolist() == [1.0, 10.0, 4.0]
    ones[2].hear(everybody)
    assert ones[2].news() == (1.0, 10.0, 4.0)
    assert ones[2].news() == ()
    ones[2].add(3.0)
    assert ones[2].news() == ()
    assert ones[2].news(all_heard=True) == (0.0, 0.0, 3.0), "who had no partner since has not waited"
    assert ones[2].news(all_heard=True) == ()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what a socket has sent")
@pytest.mark.parametrize(
    "layout",
    [
        "replicas=2,fsdp=2,micro_batch=3",
        pytest.param("replicas=2,tensor=2,micro_batch=3", marks=pytest.mark.nightly),
    ],
)
def test_bytes_to_other_replicas_are_told_from_those_within_one(ranks, layout):
    """As they are 2 (R − 1)/R × 4 bytes a number, in bf16 half as many; within a replica many more go."""
    for codec, times in (("none", 1), ("bf16", 2)):
        told = ranks.run("tests.sync.waits_cases:sent_across", 4, layout=layout, codec=codec, steps=3)
        for sent, whole, numbers, connections in told:
            assert connections == 1
            # Gloo adds some hundred bytes to a tensor, which count in so small a model.
            assert 1 <= sent / (3 * 4 * numbers / times) < 1.3
            assert whole > 1.5 * sent
