"""Saving beside training: what blocks, what fails, what is left behind."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import Saver, folders, saver, writer
from shoal.checkpoint.messages import Part, part_name
from shoal.shard import Shard, State
from tests.checkpoint.fleet import Fleet, assert_is, names, rank_state

# Rows of a state whose data is larger than any of the limits below.
LARGE = 20_000


def test_older_ones_go_when_the_new_one_is_complete(tmp_path):
    with Fleet(tmp_path, keep=2) as fleet:
        for step in (10, 20, 30):
            assert all(pending.error is None for pending in fleet.step(step))
        assert names(tmp_path) == ["step-00000020", "step-00000030"]
        assert_is(tmp_path / "step-00000020", 20)
        assert_is(tmp_path / "step-00000030", 30)
        assert not [
            name for name in names(tmp_path / "step-00000030") if not name.startswith(("rank", "manifest"))
        ]


def test_save_returns_before_anything_is_written(tmp_path):
    """The helper stands still: save returns all the same, and what training then changes is not what is saved."""
    with Saver(tmp_path, 0, 1, 2, nonce="n") as one:
        os.kill(one._helper.process.pid, signal.SIGSTOP)
        weight = torch.ones(1000)
        pending = one.save(State([Shard("w", (1000,), (0,), weight)]), 1)
        weight.zero_()
        assert not pending.done()
        assert pending.error is None
        assert pending.write_seconds is None
        os.kill(one._helper.process.pid, signal.SIGCONT)
        # The one buffer is in use: the next save waits for the first.
        second = one.save(State([Shard("w", (1000,), (0,), weight)]), 2)
        assert pending.done()
        assert second.wait()
        assert second.waited_seconds > 0
        assert pending.write_seconds > 0
    (name, saved), *_ = checkpoint.tensors(tmp_path / "step-00000001")
    assert name == "w"
    assert (saved == 1).all()


def test_close_waits_for_the_save_that_is_on_its_way(tmp_path):
    with Fleet(tmp_path, world=1) as fleet:
        fleet.savers[0].save(rank_state(7, 0, 1), 7)
        fleet.savers[0].close()
        assert_is(tmp_path / "step-00000007", 7)
        fleet.savers.clear()


def test_ranks_that_hold_nothing_take_part(tmp_path):
    with Fleet(tmp_path) as fleet:
        states = [
            rank_state(5, 0, 1),
            State([]),
            State([Shard("norm.weight", (12, 5), (12, 0), torch.empty(0, 5))]),
        ]
        assert all(pending.error is None for pending in fleet.save(states, 5))
    assert names(tmp_path / "step-00000005") == ["manifest.json", "rank-00000.safetensors"]
    assert_is(tmp_path / "step-00000005", 5)


def test_elements_that_nobody_or_two_ranks_save_are_refused_by_name(tmp_path):
    with Fleet(tmp_path) as fleet:
        fleet.step(1)
        states = [rank_state(2, rank, 3) for rank in range(3)]
        states[1].shards[1].owner = False
        assert "'exp_avg.norm.weight': 20 of 60 elements" in str(fleet.save(states, 2)[0].error)
        states = [rank_state(3, rank, 3) for rank in range(3)]
        states[2].shards[2].owner = True
        error = str(fleet.save(states, 3)[0].error)
        assert "'count': rank-00001.safetensors and rank-00002.safetensors hold the same" in error
        assert names(tmp_path) == ["step-00000001"]
        assert fleet.step(4)[0].error is None


def test_what_a_crash_left_is_neither_used_nor_kept(tmp_path):
    stale = tmp_path / folders.Attempt("crashed", 1).temporary(folders.name_of(10))
    with Fleet(tmp_path, nonce="crashed"):
        stale.mkdir()
        for rank in range(3):
            (stale / part_name(rank)).write_bytes(b"nonsense")
    with Fleet(tmp_path, nonce="second") as fleet:
        assert names(tmp_path) == []
        stale.mkdir()
        assert fleet.step(10)[0].error is None
    assert names(tmp_path) == ["step-00000010"]
    assert_is(tmp_path / "step-00000010", 10)


def test_a_rank_that_does_not_come_is_named(tmp_path):
    with Fleet(tmp_path, world=2, timeout=0.2) as fleet:
        pending = fleet.savers[0].save(rank_state(1, 0, 2), 1)
        assert pending.wait(20)
        assert "rank 1 has not written its part" in str(pending.error)
        assert names(tmp_path) == []


# --- a full disk -------------------------------------------------------------------------------------------


def check_full(fleet: Fleet, rank: int, make_full, make_room, reason: str) -> None:
    assert fleet.step(1)[0].error is None
    make_full()
    pending = fleet.step(2, LARGE)
    assert reason in str(pending[rank].error)
    assert "step 2 was not saved" in str(pending[0].error)
    assert reason in str(pending[0].error)
    assert "step-00000002" in str(pending[0].error)
    assert names(fleet.root) == ["step-00000001"]
    assert checkpoint.newest(fleet.root, pytest.fail) == fleet.root / "step-00000001"
    assert_is(fleet.root / "step-00000001", 1)
    make_room()
    assert fleet.step(3)[0].error is None
    assert_is(fleet.root / "step-00000003", 3)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_file_that_may_not_grow(tmp_path, rank):
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with Fleet(tmp_path) as fleet:

        def limit(size) -> None:
            resource.prlimit(fleet.helper(rank), resource.RLIMIT_FSIZE, size)

        check_full(
            fleet, rank, lambda: limit((60_000, unlimited[1])), lambda: limit(unlimited), "File too large"
        )


def test_a_full_disk(tmp_path):
    """A file system of 200 kB, in memory; needs the right to mount."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        with Fleet(tmp_path) as fleet:
            check_full(fleet, 0, lambda: None, lambda: None, "No space left on device")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_no_space_at_any_moment(tmp_path, monkeypatch):
    """Every wait for the disk fails in turn, in the helper's own code run in this process."""
    real, left = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        real(file)

    with Fleet(tmp_path, world=1, keep=1) as fleet:
        fleet.step(1)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(fleet.savers[0]._helper, "send", lambda order: orders.append(order))
        failures = 0
        while True:
            orders: list = []
            fleet.savers[0]._pending = None
            fleet.savers[0].save(rank_state(2, 0, 1), 2)
            left = failures + 1
            report = writer.obey(orders[0], fleet.savers[0]._memory.file)
            if not report.error:
                break
            failures += 1
            assert "No space left" in report.error
            assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
            assert_is(tmp_path / names(tmp_path)[0], 1)
            if len(names(tmp_path)) > 1:
                # Only the last wait, for the name itself, comes after the new one was complete.
                assert_is(tmp_path / names(tmp_path)[1], 2)
        fleet.savers[0]._pending = None
    assert failures == 5
    assert [name[:13] for name in names(tmp_path)] == ["step-00000002"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with Fleet(tmp_path / "file" / "checkpoints", world=1) as fleet:
        pending = fleet.step(1)[0]
        assert "step 1 was not saved: Not a directory" in str(pending.error)
        assert str(tmp_path / "file") in str(pending.error)


# --- processes that die ------------------------------------------------------------------------------------


def newest_is_whole(root: Path, *steps: int) -> int:
    folder = checkpoint.newest(root, pytest.fail)
    step = checkpoint.describe(folder)["step"] if folder else 0
    assert step in steps
    if folder:
        assert_is(folder, step, verified=True)
    return step


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
        others = [Saver(tmp_path, r, world, 1, nonce=f"n{point}", timeout=0.3) for r in range(rank)]
        monkeypatch.setenv("KILL_AT", str(point))
        watched = Saver(tmp_path, rank, world, 1, nonce=f"n{point}", timeout=0.3)
        monkeypatch.delenv("KILL_AT")
        pending = [one.save(rank_state(new, one.rank, world), new) for one in [watched, *others]]
        assert all(one.wait(20) for one in pending)
        for one in [watched, *others]:
            one.close()
        died = "ended with code -9" in str(pending[0].error)
        step = newest_is_whole(tmp_path, old, new)
        seen.add(step - old)
        if not died:
            assert step == new
            break
        old, new = step, new + 1
    assert point > (20 if rank == 0 else 5)
    assert seen == {0, 1}
    Saver(tmp_path, 0, 1, 1, nonce="after").close()
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_helper_killed_at_any_time(tmp_path):
    """Old or new, and after it a new helper saves on."""
    done = [0]
    with Fleet(tmp_path, keep=2) as fleet:
        for step in range(1, 13):
            pending = [one.save(rank_state(step, one.rank, 3, LARGE), step) for one in fleet.savers]
            pending[0].wait(step * 0.003)
            os.kill(fleet.helper(step % 3), signal.SIGKILL)
            # The others find out when that rank goes on to its next save, or, here, by their patience.
            for one in fleet.savers:
                one.timeout = 0.3
            assert all(one.wait(20) for one in pending)
            folder = checkpoint.newest(tmp_path, pytest.fail)
            done.append(checkpoint.describe(folder)["step"] if folder else 0)
            assert done[-1] in (done[-2], step)
            if folder:
                assert_is(folder, done[-1], LARGE, verified=True)
        assert all(pending.error is None for pending in fleet.step(99))
        newest_is_whole(tmp_path, 99)


def test_a_rank_that_lost_its_helper_does_not_hold_up_rank_0(tmp_path):
    with Fleet(tmp_path, world=2, timeout=1000) as fleet:
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
    # Saves are one behind each other; the last line may not have been printed.
    assert last - 2 <= step <= last + 1
    assert_is(folder, step, LARGE)
    if shared:
        left = {name for name in os.listdir("/dev/shm") if "shoal" in name}
        assert not left - shared


def test_signals_to_the_whole_group_do_not_end_a_save(tmp_path):
    with Fleet(tmp_path, world=1) as fleet:
        fleet.step(1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(fleet.helper(0), number)
        helper = fleet.helper(0)
        assert fleet.step(2)[0].error is None
        assert fleet.helper(0) == helper


def test_nothing_is_pickled(tmp_path, monkeypatch):
    """Here every entry to pickle fails; in the helper, a hook kills it."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickled")

    for name in ("loads", "load", "Unpickler", "_Unpickler", "dumps", "dump", "Pickler", "_Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(saver, "_WRITER", "tests.checkpoint.watched")
    with Fleet(tmp_path) as fleet:
        assert all(pending.error is None for pending in fleet.step(4))
    newest_is_whole(tmp_path, 4)


def test_the_helper_starts_without_torch():
    code = "import sys, shoal.checkpoint.writer; print([m for m in ('torch', 'numpy', 'pickle') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in found.stdout
    assert "numpy" not in found.stdout


def test_values_that_json_would_change_are_refused(tmp_path):
    with Fleet(tmp_path, world=1) as fleet:
        for value in (float("nan"), (1, 2)):
            with pytest.raises(AssertionError, match="JSON"):
                fleet.savers[0].save(State([], {"value": value}), 1)


def test_parts_say_why_they_failed():
    assert Part({}, error="No space left on device").file is None
