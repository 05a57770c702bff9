"""What ranks do in the tests of launching."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shoal import device, mesh, operations
from shoal.errors import JobError
from shoal.job import Layout
from shoal.mesh import Mesh, Seat
from tests.launch import sockets


def everybody(seat: Seat) -> Mesh:
    return mesh.build(Layout(replicas=seat.world), seat, timeout=30)


def all_reduce(seat: Seat) -> list[float]:
    """[sum over all ranks of 1 + member, twice]; leaves its group open."""
    everybody(seat)
    value = torch.full((2,), 1.0 + seat.member)
    dist.all_reduce(value)
    return value.tolist()


def seat_and_process(seat: Seat) -> list[int]:
    return [seat.member, seat.world, seat.local, seat.neighbours, os.getpid()]


def count_up(seat: Seat) -> int:
    """How many ranks of this run have come before this one."""
    return seat.store.add("counter", 1)


def learn(seat: Seat, compile: bool = False) -> float:
    """A matrix product and its gradient in parallel threads."""
    x, w = torch.ones(256, 256), torch.ones(256, 256, requires_grad=True)
    f = torch.compile(torch.matmul) if compile else torch.matmul
    f(x, w).sum().backward()
    assert w.grad is not None
    return w.grad.sum().item() / 256**2


def fail(seat: Seat, how: str, where: str = "collective", folder: str = "") -> None:
    """Rank 1 fails; the others are in a collective that it does not enter, or asleep and deaf."""
    everybody(seat)
    dist.all_reduce(torch.ones(1))
    if folder:
        Path(folder, str(os.getpid())).touch()
        dist.barrier()  # else one that has not begun yet would leave no number
    if seat.member != 1:
        if where == "collective":
            dist.all_reduce(torch.ones(1000))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(100)
    if how == "raise":
        raise ValueError("boom")
    if how == "job":
        raise JobError("sequence_length must be at least 1", where="job.toml:3", fix="data.sequence_length=256")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    assert how == "hang"
    time.sleep(100)


def hang(seat: Seat) -> None:
    time.sleep(100)


def survive(seat: Seat) -> int:
    """Rank 1 dies; the others meet without it."""
    everybody(seat)
    if seat.member == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.ones(1000))
    except RuntimeError:
        dist.destroy_process_group()
    left = mesh.View(1, tuple(m for m in range(seat.world) if m != 1))
    second = mesh.build(Layout(replicas=seat.world - 1), seat, left, timeout=30)
    value = torch.tensor([seat.member])
    dist.all_reduce(value)
    second.close()
    return int(value.item())


def peer_gone(seat: Seat) -> bool:
    """The last rank dies; whether the others' errors are recognised as its."""
    everybody(seat)
    dist.all_reduce(torch.ones(1))
    if seat.member == seat.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.ones(1000))
    except Exception as error:
        return device.peer_gone(error)
    return False


def memory_peak(seat: Seat) -> list[int]:
    """[peak before, bytes then allocated, peak after]"""
    where = torch.device("cpu")
    before = device.memory_peak(where)
    # More than all that was in use before, so that it makes a new peak.
    kept = torch.ones(before + (64 << 20), dtype=torch.uint8)
    return [before, len(kept), device.memory_peak(where)]


def greedy(seat: Seat) -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def tensor(seat: Seat) -> Any:
    return torch.ones(1)


def leave_behind(seat: Seat, folder: str) -> None:
    """Starts a program in a session of its own and forgets it."""
    program = subprocess.Popen(["sleep", "100"], start_new_session=True)
    Path(folder, str(program.pid)).touch()


def until_stopped(seat: Seat, folder: str, handler: bool) -> str:
    """Computes until SIGTERM, as training does; without handler: as a program that knows no signals."""
    stopped: list[int] = []
    if handler:
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    everybody(seat)
    for _ in range(10_000):
        flag = torch.tensor([len(stopped)])
        dist.all_reduce(flag)
        Path(folder, str(os.getpid())).touch()
        if flag.item():
            return "saved"
        time.sleep(0.01)
    raise AssertionError("nobody stopped us")


def listening(seat: Seat, bug: bool = False) -> list[str]:
    """Addresses at which launcher, server, store and ranks listen while all are connected."""
    everybody(seat)
    dist.all_reduce(torch.ones(1))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if bug else None
    found = sockets.listening(sockets.family(os.getppid()))
    dist.barrier()
    del store
    return found


def abandoned(seat: Seat) -> list[bool]:
    """Rank 0 abandons its mesh, the others wait for it in a collective: [whether they learn of it, whether all can
    build another mesh and use it]."""
    ranks = everybody(seat)
    # Who has its connections may still be ahead of another, whose building would then be what fails.
    seat.store.set(f"built-{seat.member}", "")
    told = seat.member == 0
    if seat.member == 0:
        seat.store.wait([f"built-{member}" for member in range(seat.world)])
    else:
        try:
            ranks.wait(dist.all_reduce(torch.ones(1_000_000), async_op=True))
        except (RuntimeError, ConnectionError) as error:
            told = device.peer_gone(error)
    ranks.abandon()
    again = mesh.build(Layout(replicas=seat.world), seat, mesh.View(1, tuple(range(seat.world))), timeout=30)
    ones = torch.ones(1)
    dist.all_reduce(ones)
    again.close()
    return [told, ones.item() == seat.world]


def killed_in_transfer(seat: Seat) -> bool:
    """Rank 0 is killed in the middle of a message to the others: whether they learn of it."""
    ranks = mesh.build(Layout(replicas=seat.world), seat, timeout=600)
    large = torch.ones(64 << 20)
    dist.all_reduce(torch.ones(1))
    if seat.member == 0:
        dist.broadcast(large, 0, async_op=True)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    told = False
    try:
        ranks.wait(dist.broadcast(large, 0, async_op=True))
    except (RuntimeError, ConnectionError) as error:
        told = device.peer_gone(error)
    ranks.abandon()
    return told


def stuck(seat: Seat, how: str, layout: str, axis: str, timeout: float = 60.0) -> None:
    """All ranks go through operations along an axis, step after step; in the third, rank 1 fails in between them."""
    ranks = mesh.build(Layout.parse(layout), seat, timeout=timeout)
    group = ranks.group(axis)
    for step in range(1, 4):
        operations.step(step)
        dist.broadcast(torch.ones(3), group=group, group_src=0)
        if step == 3 and seat.member == 1:
            _go_wrong(how, group)
        if how == "differ":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.all_reduce(torch.ones(5), group=group)
        ranks.wait(dist.all_reduce(torch.ones(7), async_op=True))


def _go_wrong(how: str, group: dist.ProcessGroup) -> None:
    if how == "raise":
        raise ValueError("boom")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(100)
    if how == "skip":
        return dist.barrier()  # another group's, while the others are in this one's
    if how == "shape":
        return dist.all_reduce(torch.ones(50), group=group)
    assert how == "differ"
    dist.barrier(group=group)


def talking(seat: Seat) -> int:
    """Threads of groups that an earlier call has left."""
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith(("gloo_tcp_loop", "pt_gloo")) for name in names)
