"""Roles of the tests of `shoal.launch.roles`. They meet by files in a folder, whose names say who wrote them."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal import mesh
from shoal.errors import JobError
from shoal.job import Layout
from shoal.mesh import Seat
from tests.launch import sockets

# Far longer than anything here takes, on a machine however busy.
PATIENCE = 60.0


def note(folder: str, name: str) -> None:
    """Says that this process, of which the file holds the number, has come so far."""
    _write(Path(folder, name), str(os.getpid()))


def until(folder: str, names: Iterable[str]) -> None:
    """All these have been noted."""
    deadline = time.monotonic() + PATIENCE
    while not all(Path(folder, name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names}: there are {os.listdir(folder)}"
        time.sleep(0.01)


def lead(seat: Seat, folder: str, awaited: list[str], life: int, die: bool = False) -> int:
    """Waits for what is noted, then lets everybody return; in its first life it may die instead."""
    note(folder, f"leader-{life}")
    until(folder, awaited)
    if die and life == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    note(folder, "end")
    return life


def work(
    seat: Seat, folder: str, name: str, life: int, how: str = "", victim: int = 0, lives: int = 1, deaf: bool = False
) -> None:
    """A sum over the group, then waiting for the end; in its first `lives` lives, `victim` of its ranks fails.

    deaf: the others then neither notice nor end by SIGTERM.
    """
    ranks = mesh.build(Layout(replicas=seat.world), seat, timeout=PATIENCE)
    total = ranks.largest(1.0 + seat.member)
    assert total == seat.world
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(folder, f"{name}.{seat.member}-{life}")
    if life < lives and how and seat.member == victim:
        _fail(how)
    if how and life < lives and not deaf:
        ranks.wait(dist.all_reduce(torch.ones(1), async_op=True))  # the victim does not come
    until(folder, ["end"])
    ranks.close()


def _fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "peer":
        raise ConnectionResetError("the coordinator is gone")
    if how == "late bug":
        time.sleep(0.4)  # the others have said by then that they lost a peer
    if how == "job":
        error = JobError("sequence_length must be at least 1", where="job.toml:3", fix="data.sequence_length=256")
        raise error from ConnectionResetError("the coordinator closed for this reason")
    raise ValueError("boom")


def follow(seat: Seat, folder: str, life: int, name: str, bug: bool) -> None:
    """Rank 0 has lost a peer, of which rank 1 only knows the reason, if any: in its first life, a moment later."""
    note(folder, f"{name}.{seat.member}-{life}")
    if life == 0 and seat.member == 0:
        raise ConnectionResetError("rank 1 is gone")
    if life == 0 and bug:
        time.sleep(0.3)
        raise ValueError("boom")
    until(folder, ["end"])


def seats(seat: Seat, folder: str, life: int, name: str) -> None:
    """Writes down its seat and how the process is called, as it ends in good order."""
    comm = Path("/proc/self/comm").read_text().strip()
    ranks = mesh.build(Layout(replicas=seat.world), seat, timeout=PATIENCE)
    # Whoever returns closes its connections, and a rank that still waits to be connected takes that for a lost peer.
    assert ranks.largest(1.0) == 1.0
    hosts, threads = ranks._hosts, torch.get_num_threads()
    text = f"{seat.member} {seat.world} {seat.local} {seat.neighbours} {hosts}, {threads}, {comm}"
    atexit.register(_write, Path(folder, f"{name}.{seat.member}"), text)


def _write(file: Path, text: str) -> None:
    file.with_name(f".{file.name}").write_text(text)
    file.with_name(f".{file.name}").rename(file)


def gather(seat: Seat, folder: str, life: int, awaited: list[str]) -> dict[str, str]:
    until(folder, awaited)
    atexit.register(_write, Path(folder, "gathered"), "")
    atexit.register(time.sleep, 0.3)  # before it
    return {name: Path(folder, name).read_text() for name in awaited}


def wait(seat: Seat, folder: str, life: int, name: str, handler: str = "") -> str:
    """Until SIGTERM, of which a note is made: `heard` returns then, `default` ends by it, `deaf` hears nothing."""
    heard: list[int] = []
    if handler == "heard":
        signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    if handler == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(folder, f"{name}-{life}")
    deadline = time.monotonic() + PATIENCE
    while not heard and not Path(folder, "end").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    note(folder, f"{name}-{'heard' if heard else 'not-heard'}")
    return "saved"


def save(seat: Seat, folder: str, life: int) -> Any:
    """A leader that drains when it is asked to stop, and then lets the others return."""
    value = wait(seat, folder, life, "leader", "heard")
    note(folder, "end")
    return value


def bug(seat: Seat, folder: str, life: int, awaited: list[str]) -> None:
    until(folder, awaited)
    time.sleep(0.3)  # whoever noted it returns first
    raise ValueError("boom")


def dies_at_the_end(seat: Seat, folder: str, life: int) -> None:
    note(folder, f"dying-{life}")
    until(folder, ["end"])
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_store(seat: Seat, life: int) -> None:
    for pid in sockets.family(os.getppid()):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "shoal-store":
            os.kill(pid, signal.SIGKILL)
    time.sleep(PATIENCE)
