"""The pool of reused ranks: each run starts clean, whatever the one before did."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from shoal.errors import JobError, RankError
from shoal.launch.pool import Pool
from tests.launch import sockets

CASES = "tests.launch.cases:"


def kill(ranks: Pool, name: str) -> None:
    """Kills the pool's process with this name, and lets the pool hear of it."""
    assert ranks._ranks is not None
    server = ranks._ranks.server.process
    pids = sockets.family(server.pid)
    (victim,) = [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == name]
    os.kill(victim, signal.SIGKILL)
    if victim == server.pid:
        server.wait()
    else:
        before = len(ranks._ranks.alive), ranks._ranks.has_store
        while (len(ranks._ranks.alive), ranks._ranks.has_store) == before:
            ranks._ranks.events(timeout=30)


def test_values_come_by_rank_from_reused_processes_and_the_pool_grows(ranks):
    first = ranks.run(CASES + "seat_and_process", 2)
    assert [seat[:4] for seat in first] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    second = ranks.run(CASES + "seat_and_process", 5)
    assert [seat[:4] for seat in second] == [[member, 5, member, 5] for member in range(5)]
    assert [seat[4] for seat in second[:2]] == [seat[4] for seat in first]
    assert len({seat[4] for seat in second}) == 5


def test_runs_share_no_keys_and_leave_no_groups(ranks):
    for world in (2, 3, 3):
        assert sorted(ranks.run(CASES + "count_up", world)) == list(range(1, world + 1))
        assert ranks.run(CASES + "all_reduce", world) == [[world * (world + 1) / 2] * 2] * world


def test_forked_ranks_compute_in_parallel_threads(ranks):
    assert ranks.run(CASES + "learn", 2, threads=2, timeout=30) == [256.0, 256.0]


@pytest.mark.nightly
def test_forked_ranks_compile(ranks):
    assert ranks.run(CASES + "learn", 2, compile=True) == [256.0, 256.0]


@pytest.mark.parametrize(
    ("how", "where", "first", "last"),
    [
        ("raise", "collective", "rank 1: failed", "ValueError: boom"),
        ("kill", "collective", "rank 1: killed by SIGKILL\n  ranks 0 and 2 waited for it in all_reduce", "limit"),
        ("exit", "collective", "rank 1: ended with exit code 3", "waited for it in all_reduce along replicas"),
        ("hang", "sleep", "ranks 0, 1, 2: no answer within 1 s", "no answer within 1 s"),
    ],
)
def test_the_cause_is_raised_and_the_next_run_starts_clean(ranks, how, where, first, last):
    ranks.run(CASES + "count_up", 3)
    with pytest.raises(RankError) as caught:
        ranks.run(CASES + "fail", 3, how=how, where=where, timeout=1 if how == "hang" else 30)
    assert str(caught.value).startswith(first)
    assert str(caught.value).endswith(last)
    assert ranks.run(CASES + "all_reduce", 3) == [[6.0, 6.0]] * 3


def test_a_users_mistake_is_raised_again_with_the_rank_named(ranks):
    with pytest.raises(JobError) as caught:
        ranks.run(CASES + "fail", 2, how="job")
    assert caught.value.exit_code == 2
    assert str(caught.value) == ("rank 1, job.toml:3: sequence_length must be at least 1\n  → data.sequence_length=256")


def test_a_value_that_is_not_json_is_refused(ranks):
    with pytest.raises(RankError, match="Encoding objects of type Tensor is unsupported"):
        ranks.run(CASES + "tensor", 2)


def test_ranks_survive_one_that_is_expected_to_die(ranks):
    assert ranks.run(CASES + "survive", 3, lost={1}) == [2, None, 2]
    assert ranks.run(CASES + "all_reduce", 3) == [[6.0, 6.0]] * 3


@pytest.mark.parametrize("name", ["shoal-store", "shoal-rank-0", "shoal-fork"])
def test_processes_killed_between_runs_are_replaced(ranks, name):
    ranks.run(CASES + "count_up", 1)
    kill(ranks, name)
    assert ranks.run(CASES + "all_reduce", 3) == [[6.0, 6.0]] * 3


def test_everything_listens_on_loopback(ranks):
    for found in ranks.run(CASES + "listening", 3):
        # The store and a listener of each rank's backend.
        assert len(found) >= 4
        assert all(ipaddress.ip_address(address).is_loopback for address in found)


def test_a_store_that_listens_everywhere_would_be_seen(ranks):
    for found in ranks.run(CASES + "listening", 2, bug=True):
        assert not all(ipaddress.ip_address(address).is_loopback for address in found)


def test_memory_that_cannot_be_had_is_said_in_a_sentence(ranks):
    with pytest.raises(RankError, match=r"^rank \d: out of memory: 1.05e\+06 GiB more could not be had") as caught:
        ranks.run("tests.launch.cases:greedy", 2)
    assert "micro_batch" in caught.value.fix


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process's threads can be counted")
def test_training_leaves_no_group_behind_whose_threads_go_on():
    """They and the model would stay, one more with every call. (Torch itself keeps those of a `fully_shard`, once.)"""
    layouts = ["replicas=2,micro_batch=3", "fsdp=2,micro_batch=3", "pipeline=2,micro_batch=3", "tensor=2,micro_batch=6"]
    with Pool(2, ["tests.equivalence.cases"]) as pool:
        for _ in range(3):
            for layout in layouts:
                pool.run("tests.equivalence.cases:run", 2, layout=layout, steps=1, model="even")
        # A thread that has ended may still be listed for a moment.
        deadline = time.monotonic() + 30
        while max(pool.run("tests.launch.cases:talking", 2)) > 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
