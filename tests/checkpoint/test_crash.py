"""Helpers and ranks that are killed while they save: the newest checkpoint is always a whole one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from shoal import checkpoint
from shoal.checkpoint import Saver, folders, saver
from shoal.checkpoint.messages import Order, part_name
from tests.checkpoint.fleet import LARGE, Fleet, assert_is, names, newest_is_whole, rank_state


@pytest.mark.parametrize("rank", [0, 1])
def test_helper_killed_at_every_operation_on_files(tmp_path, monkeypatch, rank):
    world = rank + 1
    monkeypatch.setattr(saver, "_WRITER", "tests.checkpoint.watched")
    with Fleet(tmp_path, world, keep=1, nonce="before") as fleet:
        fleet.step(1)
    old, new, point = 1, 2, 0
    seen = set()
    while True:
        point += 1
        others = [Saver(tmp_path, r, world, 1, nonce=f"n{point}") for r in range(rank)]
        monkeypatch.setenv("KILL_AT", str(point))
        watched = Saver(tmp_path, rank, world, 1, nonce=f"n{point}")
        monkeypatch.delenv("KILL_AT")
        pending = [one.save(rank_state(new, one.rank, world), new) for one in [watched, *others]]
        assert pending[0].wait(20)
        died = "ended with code -9" in str(pending[0].error)
        if died and others:
            # It goes on to its next save, from which rank 0 sees that this one will not come.
            watched.save(rank_state(99, rank, world), 99)
        assert all(one.wait(20) for one in pending)
        for one in [watched, *others]:
            one.close()
        step = newest_is_whole(tmp_path, old, new)
        seen.add(step == new)
        if not died:
            assert step == new
            break
        old, new = step, new + 1
    assert point > (20 if rank == 0 else 5)
    assert seen == {False, True}
    Saver(tmp_path, 0, 1, 1, nonce="after").close()
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_helper_killed_at_any_time(tmp_path):
    """Each rank's in turn, a little later every time. The newest is whole at any time, and saving goes on."""
    last = 0
    with Fleet(tmp_path) as fleet:
        for step in range(1, 16):
            pending = [one.save(rank_state(step, one.rank, 3, LARGE), step) for one in reversed(fleet.savers)]
            pending[-1].wait(step * 0.003)
            os.kill(fleet.helper(step % 3), signal.SIGKILL)
            last = newest_is_whole(tmp_path, last, step - 1, step, rows=LARGE)
        assert all(pending.error is None for pending in fleet.step(99))
        newest_is_whole(tmp_path, 99)


def test_a_rank_says_that_its_helper_died_in_the_last_save(tmp_path):
    """Rank 0 need not wait for the timeout, nor for a next save, which never comes."""
    with Fleet(tmp_path, world=2, timeout=600) as fleet:
        fleet.step(1)
        os.kill(fleet.helper(1), signal.SIGSTOP)
        last = [one.save(rank_state(2, one.rank, 2), 2) for one in fleet.savers]
        os.kill(fleet.helper(1), signal.SIGKILL)
        assert all(one.wait(20) for one in reversed(last))
        told = str(last[0].error)
        assert "step 2 was not saved: rank 1: the helper process ended with code -9" in told
        assert "step-00000001 is intact" in told
        assert newest_is_whole(tmp_path, 1) == 1
        assert all(pending.error is None for pending in fleet.step(3))
        assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_rank_that_lost_its_helper_does_not_hold_up_rank_0(tmp_path, monkeypatch):
    """Nor where the disk is too full to say so: its next save tells."""
    monkeypatch.setattr(saver, "_excuse", lambda *_: None)
    with Fleet(tmp_path, world=2, timeout=60) as fleet:
        os.kill(fleet.helper(1), signal.SIGSTOP)
        first = [one.save(rank_state(1, one.rank, 2), 1) for one in fleet.savers]
        os.kill(fleet.helper(1), signal.SIGKILL)
        assert first[1].wait(20)
        assert "the helper process ended with code -9" in str(first[1].error)
        assert not first[0].done()
        second = [one.save(rank_state(2, one.rank, 2), 2) for one in reversed(fleet.savers)]
        assert "rank 1 lost its helper" in str(first[0].error)
        assert all(one.wait(20) for one in second)
        assert names(tmp_path) == ["step-00000002"]
        assert_is(tmp_path / "step-00000002", 2)


def test_a_part_that_was_finished_counts_though_its_helper_died(tmp_path):
    with Fleet(tmp_path, world=2) as fleet:
        os.kill(fleet.helper(0), signal.SIGSTOP)
        pending = [one.save(rank_state(1, one.rank, 2), 1) for one in fleet.savers]
        while not list(tmp_path.glob("*/" + part_name(1))):
            time.sleep(0.01)
        order = fleet.savers[1]._helper._order
        assert order is not None
        saver._excuse(order, "died")
        os.kill(fleet.helper(0), signal.SIGCONT)
        assert all(one.wait(20) for one in pending)
        assert pending[0].error is None
        assert_is(tmp_path / "step-00000001", 1)


RANK = """
import sys
from pathlib import Path
from shoal.checkpoint import Saver
from tests.checkpoint.fleet import rank_state
saver = Saver(Path(sys.argv[1]), 0, 1, 2, nonce="n")
for step in range(1, 100000):
    saver.save(rank_state(step, 0, 1, 20000), step)
    print(step, flush=True)
"""


def test_a_killed_rank_leaves_no_process_and_no_memory_behind(tmp_path):
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert rank.stdout is not None
    last = 0
    while last < 5:
        last = int(rank.stdout.readline())
    time.sleep(0.003)
    rank.send_signal(signal.SIGKILL)
    # The helper has the same stderr: its end is the end of both processes.
    out, err = rank.communicate(timeout=20)
    assert err == ""
    last = max([last, *map(int, out.split())])
    folder = checkpoint.newest(tmp_path, pytest.fail)
    assert folder is not None
    step = checkpoint.describe(folder)["step"]
    # The save before the last one had ended; one more may have been on its way unprinted.
    assert last - 1 <= step <= last + 1
    assert_is(folder, step, LARGE)
    if os.path.isdir("/dev/shm"):
        # As Python's and torch's shared memory is named.
        left = {name for name in os.listdir("/dev/shm") if name.startswith(("shoal", "psm_", "torch_"))}
        assert not left - shared


def test_a_helper_whose_rank_is_gone_says_nothing(tmp_path):
    """Its last report reaches nobody, which it may find out before it reads the end of its orders."""
    memory = os.memfd_create("orders")
    helper = subprocess.Popen(
        [sys.executable, "-m", saver._WRITER, str(memory)], pass_fds=[memory], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(memory)
    assert helper.stdin is not None
    assert helper.stdout is not None
    assert helper.stderr is not None
    helper.stdout.close()
    order = Order(str(tmp_path), 1, 0, 1, 2, folders.Attempt("n", 1), 20.0, 0, {}, {"step": 1})
    helper.stdin.write(msgspec.json.encode(order) + b"\n")
    helper.stdin.flush()
    assert helper.stderr.read() == b""
    assert helper.wait(20) == 0
    assert names(tmp_path) == ["step-00000001"]


def test_signals_to_the_whole_group_do_not_end_a_save(tmp_path):
    with Fleet(tmp_path, world=1) as fleet:
        fleet.step(1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(fleet.helper(0), number)
        helper = fleet.helper(0)
        assert fleet.step(2)[0].error is None
        assert fleet.helper(0) == helper
