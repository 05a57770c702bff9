"""Roles: one that is lost is started again, the others go on, and what is not a loss ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from shoal.errors import JobError, RankError
from shoal.launch import failure, roles
from shoal.launch.messages import Ended, Failed
from shoal.launch.ranks import Ranks
from shoal.launch.roles import Role
from tests.launch import sockets
from tests.launch.role_cases import PATIENCE

CASES = "tests.launch.role_cases:"


class Start:
    """Runs roles in a folder, with processes from the pool's fork server. said: line by line."""

    def __init__(self, pool, folder: Path):
        self.ranks, self.folder, self.said = pool.start(), folder, list[str]()

    def role(self, title: str, case: str, ranks: int = 1, first: int = 0, neighbours: int = 1, **args) -> Role:
        return Role(title, CASES + case, {"folder": str(self.folder), **args}, ranks, first, neighbours)

    def worker(self, number: int, ranks: int = 1, **args) -> Role:
        return self.role(f"worker {number}", "work", ranks, name=f"worker{number}", **args)

    def __call__(self, *them: Role, restarts: int = 5, superseded: Callable[[], bool] | None = None):
        """What the leader returned. Whatever comes out, nothing is left of the roles, and the idle ranks are."""
        idle = set(self.ranks.alive)
        try:
            return roles.run(self.ranks, them, say=self.said.append, restarts=restarts, superseded=superseded)
        finally:
            assert set(self.ranks.alive) == idle
            assert not [pid for pid in self.pids().values() if sockets.alive(pid)]

    def pids(self) -> dict[str, int]:
        """The process behind each note."""
        texts = {file.name: file.read_text() for file in self.folder.iterdir()}
        return {name: int(text) for name, text in texts.items() if text.isdigit()}


@pytest.fixture
def start(ranks, tmp_path):
    return Start(ranks, tmp_path)


def test_the_leaders_value_and_everybodys_seat(start):
    two = [start.role(f"worker {n}", "seats", 2, first=2 * n, neighbours=4, name=f"worker{n}") for n in range(2)]
    two[1] = replace(two[1], threads=2)
    names = [f"worker{n}.{rank}" for n in range(2) for rank in range(2)]
    # While the leader still waits, those who have returned end, with their exit handlers; so does it in the end.
    assert start(start.role("coordinator", "gather", awaited=names), *two) == {
        "worker0.0": "0 2 0 4 {}, 1, shoal-worker0.0",
        "worker0.1": "1 2 1 4 {}, 1, shoal-worker0.1",
        "worker1.0": "0 2 2 4 {}, 2, shoal-worker1.0",
        "worker1.1": "1 2 3 4 {}, 2, shoal-worker1.1",
    }
    assert (start.folder / "gathered").exists()
    assert start.said == []


@pytest.mark.parametrize(
    ("group", "how", "deaf", "said"),
    [
        (1, "kill", False, "worker 1 was killed by SIGKILL: started again"),
        (2, "kill", False, "worker 1 was killed by SIGKILL: started again"),
        (2, "kill", True, "worker 1 was killed by SIGKILL: started again"),
        (1, "exit", False, "worker 1 ended with exit code 3 before it was done: started again"),
        (1, "peer", False, "worker 1 lost a peer (ConnectionResetError: the coordinator is gone): started again"),
    ],
)
def test_a_lost_role_is_started_again_and_the_others_go_on(start, group, how, deaf, said):
    again = [f"worker1.{rank}-1" for rank in range(group)]
    leader = start.role("coordinator", "lead", awaited=["worker0.0-0", *again])
    lost = start.worker(1, group, how=how, victim=group - 1, deaf=deaf)
    assert start(leader, start.worker(0), lost) == 0
    assert start.said == [said]
    once = ["leader-0", "worker0.0-0", *(f"worker1.{rank}-0" for rank in range(group))]
    assert sorted(start.pids()) == sorted(["end", *once, *again])


def test_a_rank_that_hangs_without_its_peer_is_killed_too(start):
    leader = start.role("coordinator", "lead", awaited=["pair.0-1", "pair.1-1"])
    assert start(leader, start.role("pair", "follow", 2, name="pair", bug=False)) == 0
    assert start.said == ["pair lost a peer (ConnectionResetError: rank 1 is gone): started again"]


def test_a_lost_leader_is_started_again(start):
    leader = start.role("coordinator", "lead", awaited=["worker0.0-0"], die=True)
    assert start(leader, start.worker(0)) == 1
    assert start.said == ["coordinator was killed by SIGKILL: started again"]


def test_too_many_losses_of_one_role_are_an_error_that_names_it(start):
    leader = start.role("coordinator", "lead", awaited=["nothing"])
    with pytest.raises(RankError) as caught:
        start(leader, start.worker(0), start.worker(1, how="kill", lives=9), restarts=2)
    assert str(caught.value).startswith("worker 1: killed by SIGKILL; lost 3 times within 60 s\n  → ")
    assert start.said == ["worker 1 was killed by SIGKILL: started again"] * 2


def test_losses_that_are_long_ago_do_not_count(start, monkeypatch):
    monkeypatch.setattr(roles, "_WITHIN", 0.0)
    leader = start.role("coordinator", "lead", awaited=["worker0.0-2"])
    assert start(leader, start.worker(0, how="exit", lives=2), restarts=1) == 0


def test_what_a_rank_makes_of_its_peers_death_is_no_bug():
    nothing = SimpleNamespace(fork=lambda *_: None, ask=lambda *_: None)
    group = roles._Group(cast(Ranks, nothing), Role("pair", "", {}, 2), 10)
    group.start()
    assert group.hear(11, Ended(0, -signal.SIGKILL)) is None
    assert group.hear(10, Failed("", "AssertionError: half a message", "", "", 0.0, False)) is None
    group.start()
    told = group.hear(10, Failed("", "AssertionError: half a message", "", "", 0.0, False))
    assert told is not None
    assert told.error.where == "pair, rank 0"


def test_who_was_killed_for_want_of_memory():
    killed = [failure.ended(0, -signal.SIGKILL, 0.0, out_of_memory, "worker 0") for out_of_memory in (False, True)]
    assert [roles._how(cause) for cause in killed] == [
        "was killed by SIGKILL",
        "was killed by SIGKILL (the kernel ran out of memory)",
    ]


def test_a_users_mistake_ends_all_with_the_role_named(start):
    leader = start.role("coordinator", "wait", name="leader", handler="heard")
    deaf = start.role("server 0", "wait", name="server", handler="deaf")
    with pytest.raises(JobError) as caught:
        start(leader, deaf, start.worker(0, 2, how="job", victim=1))
    where = "worker 0, rank 1, job.toml:3"
    assert str(caught.value) == f"{where}: sequence_length must be at least 1\n  → data.sequence_length=256"


def test_everybody_is_asked_to_stop_before_they_are_killed(start, monkeypatch):
    monkeypatch.setattr(roles, "_GRACE", PATIENCE)
    leader = start.role("coordinator", "lead", awaited=["nothing"])
    asked = start.role("server 0", "wait", name="server", handler="heard")
    with pytest.raises(RankError, match="worker 0: failed"):
        start(leader, asked, start.role("worker 0", "bug", awaited=["server-0"]))
    assert "server-heard" in start.pids()


@pytest.mark.parametrize("case", ["follow", "work"])
def test_a_bug_ends_all_with_its_traceback_also_where_others_were_first_to_notice(start, case, monkeypatch):
    monkeypatch.setattr(roles, "_CAUSE", PATIENCE)
    leader = start.role("coordinator", "lead", awaited=["nothing"])
    args = {"bug": True} if case == "follow" else {"how": "late bug", "victim": 1}
    with pytest.raises(RankError) as caught:
        start(leader, start.role("worker 0", case, 2, name="worker0", **args))
    lines = str(caught.value).splitlines()
    assert (lines[0], lines[-1]) == ("worker 0, rank 1: failed", "ValueError: boom")
    assert any("role_cases.py" in line for line in lines)
    assert start.said == []


def test_what_fails_after_the_leader_has_returned_is_only_said(start, monkeypatch):
    monkeypatch.setattr(roles, "_RETURN", PATIENCE)
    them = start.role("dying", "dies_at_the_end"), start.role("bug", "bug", awaited=["end"]), start.worker(0)
    leader = start.role("coordinator", "lead", awaited=["dying-0", "worker0.0-0"])
    assert start(leader, *them) == 0
    (bug,) = start.said
    assert bug.startswith("bug: failed\nTraceback")
    assert "dying-1" not in start.pids()


def test_who_does_not_return_after_the_leader_is_killed(start, monkeypatch):
    monkeypatch.setattr(roles, "_RETURN", 0.2)
    late = start.role("late", "gather", awaited=["nothing"])
    assert start(start.role("coordinator", "lead", awaited=[]), late) == 0
    assert start.said == ["late had not returned 0.2 s after coordinator: killed"]


def test_the_stores_death_is_an_error(start):
    with pytest.raises(RankError, match="store was killed"):
        start(Role("coordinator", CASES + "kill_the_store", {}))


# Runs the roles of each line that it reads.
LAUNCHER = """
import json, sys
from shoal.launch import local, roles
from shoal.launch.ranks import Ranks
ranks = Ranks(["tests.launch.role_cases"])
for line in sys.stdin:
    them = [roles.Role(**fields) for fields in json.loads(line)]
    try:
        print("value", roles.run(ranks, them, say=print, on_signal=lambda name: print("stopping:", name)))
    except local.Interrupted as error:
        print(error)
"""


class Launcher:
    """A program that runs roles; it can be signalled."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, folder: Path, handler: str, case: str = "wait") -> None:
        """A leader, and two others that SIGTERM would end; returns when all are there."""
        args = {"folder": str(folder)}
        leader = args | ({"name": "leader", "handler": handler} if case == "wait" else {})
        them = [{"name": "coordinator", "entry": CASES + case, "args": leader}]
        them += [{"name": f"other {n}", "entry": f"{CASES}wait", "args": args | {"name": f"other{n}"}} for n in (0, 1)]
        assert self.process.stdin
        self.process.stdin.write(f"{json.dumps(them)}\n")
        self.process.stdin.flush()
        deadline = time.monotonic() + PATIENCE
        while not all((folder / name).exists() for name in ("leader-0", "other0-0", "other1-0")):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self, number: signal.Signals) -> None:
        """As a terminal does it: the whole process group of the launcher."""
        os.killpg(self.process.pid, number)

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip()


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    with launcher.process:
        yield launcher
        launcher.process.kill()


def none_is_left(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(sockets.alive(int(file.read_text())) for file in folder.iterdir()):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_only_the_leader_hears_the_first_signal(launcher, tmp_path, number):
    launcher.start(tmp_path, "", "save")
    launcher.kill(number)
    assert [launcher.line(), launcher.line()] == [f"stopping: {number.name}", "value saved"]
    names = {file.name for file in tmp_path.iterdir()}
    assert {name for name in names if "heard" in name} == {"leader-heard", "other0-not-heard", "other1-not-heard"}
    none_is_left(tmp_path)


def test_the_second_signal_ends_all(launcher, tmp_path):
    launcher.start(tmp_path, "deaf")
    launcher.kill(signal.SIGTERM)
    assert launcher.line() == "stopping: SIGTERM"
    launcher.kill(signal.SIGINT)
    assert launcher.line() == "stopped by SIGINT"
    none_is_left(tmp_path)


def test_a_leader_that_ends_by_the_first_signal_is_not_started_again(launcher, tmp_path):
    launcher.start(tmp_path, "default")
    launcher.kill(signal.SIGTERM)
    assert [launcher.line(), launcher.line()] == ["stopping: SIGTERM", "stopped by SIGTERM"]
    none_is_left(tmp_path)


def test_no_process_is_left_when_the_launcher_is_killed(launcher, tmp_path):
    """The last of this file: nothing runs in it any more."""
    launcher.start(tmp_path, "deaf")
    everybody = sockets.family(launcher.process.pid)
    assert len(everybody) == 6  # with fork server and store
    launcher.process.kill()
    deadline = time.monotonic() + PATIENCE
    while any(sockets.alive(pid) for pid in everybody):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.01)
