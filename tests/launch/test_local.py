"""A run on this machine: its end, its failures, its signals, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.errors import RankError
from shoal.launch import local
from tests.launch import sockets

CASES = "tests.launch.cases:"
# Far longer than anything here takes, on a machine however busy.
PATIENCE = 60.0

LAUNCHER = """
import sys
from shoal.errors import ShoalError
from shoal.launch import local
entry, world, args = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
try:
    print("value", local.run(entry, args, world, on_signal=lambda name: print("stopping:", name)))
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
except ShoalError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def launcher(case: str, world: int, **args: object) -> subprocess.Popen:
    """A program that runs a case; it and its ranks print into one pipe."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", LAUNCHER, CASES + case, str(world), repr(args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def pids(folder: Path, count: int) -> list[int]:
    """The processes that have left their number in the folder, once there are `count`."""
    deadline = time.monotonic() + PATIENCE
    while len(found := [int(file.name) for file in folder.iterdir()]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def seconds_until_gone(pids: list[int]) -> float:
    start = time.monotonic()
    while any(sockets.alive(pid) for pid in pids):
        assert time.monotonic() < start + PATIENCE, "orphans"
        time.sleep(0.01)
    return time.monotonic() - start


def test_the_launcher_does_without_torch():
    code = "import sys, shoal.launch.local, shoal.launch.torchrun; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_eight_ranks():
    start = time.monotonic()
    assert local.run(CASES + "seat_and_process", {}, 8)[:4] == [0, 8, 0, 8]
    print(f"8 ranks from start to end: {time.monotonic() - start:.2f} s")


def test_the_cause_is_printed_last_and_the_others_stop(tmp_path):
    with launcher("fail", 3, how="raise", where="sleep", folder=str(tmp_path)) as program:
        output, _ = program.communicate(timeout=PATIENCE)
    assert program.returncode == 1
    assert output.splitlines()[-1] == "ValueError: boom"
    assert not any(sockets.alive(pid) for pid in pids(tmp_path, 3))


def test_others_that_ignore_sigterm_stop_within_five_seconds(tmp_path):
    with pytest.raises(RankError, match="rank 1: killed by SIGKILL"):
        local.run(CASES + "fail", {"how": "kill", "where": "sleep", "folder": str(tmp_path)}, 3)
    # Each wrote its file just before.
    failed = min(file.stat().st_mtime for file in tmp_path.iterdir())
    assert time.time() - failed < 5
    assert not any(sockets.alive(pid) for pid in pids(tmp_path, 3))


@pytest.mark.parametrize("where", ["collective", pytest.param("sleep", marks=pytest.mark.nightly)])
def test_no_orphans_after_the_launcher_was_killed(tmp_path, where):
    with launcher("fail", 3, how="hang", where=where, folder=str(tmp_path)) as program:
        ranks = pids(tmp_path, 3)
        everybody = sockets.family(program.pid)
        assert set(ranks) < set(everybody)
        program.kill()
        print(f"gone after {seconds_until_gone(everybody):.2f} s")


def test_no_orphans_after_the_launcher_was_killed_at_once():
    with launcher("all_reduce", 2) as program:
        deadline = time.monotonic() + PATIENCE
        while len(everybody := sockets.family(program.pid)) < 2:
            assert time.monotonic() < deadline
        program.kill()
        seconds_until_gone(everybody)


def test_what_a_rank_leaves_behind_is_ended(tmp_path):
    local.run(CASES + "leave_behind", {"folder": str(tmp_path)}, 1)
    assert not any(sockets.alive(pid) for pid in pids(tmp_path, 1))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_a_signal_lets_ranks_save(tmp_path, number):
    with launcher("until_stopped", 2, folder=str(tmp_path), handler=True) as program:
        pids(tmp_path, 2)
        # As a terminal does it: to the whole process group of the launcher.
        os.killpg(program.pid, number)
        output, _ = program.communicate(timeout=PATIENCE)
    assert output.splitlines() == [f"stopping: {number.name}", "value saved"]
    assert program.returncode == 0


def test_a_signal_ends_ranks_that_do_not_handle_it(tmp_path):
    with launcher("until_stopped", 2, folder=str(tmp_path), handler=False) as program:
        pids(tmp_path, 2)
        os.killpg(program.pid, signal.SIGINT)
        output, _ = program.communicate(timeout=PATIENCE)
    assert output.splitlines() == ["stopping: SIGINT", "interrupted"]
    assert program.returncode == 130


def test_a_second_signal_kills(tmp_path):
    with launcher("fail", 2, how="hang", where="sleep", folder=str(tmp_path)) as program:
        ranks = pids(tmp_path, 2)
        assert program.stdout is not None
        os.killpg(program.pid, signal.SIGINT)
        assert program.stdout.readline() == "stopping: SIGINT\n"
        os.killpg(program.pid, signal.SIGINT)
        assert program.stdout.readline() == "interrupted\n"
        seconds_until_gone(ranks)
