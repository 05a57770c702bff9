"""What happens to a role of a server job in the middle of something: it is stopped, or killed, or a shard under it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from shoal.sync.server import journal
from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.messages import Address
from shoal.sync.server.node.other import Other
from shoal.sync.server.node.station import Station
from shoal.sync.server.wire.stream import Stream
from shoal.training.server import work
from tests.launch import sockets

# Bytes at one time, from which on a transfer has a middle.
LARGE = 16 << 10


@contextmanager
def torn(way: str, number: int) -> Iterator[None]:
    """This process is killed in the middle of the so-manieth large transfer, from 1 on, that it does with `Stream.read`
    or `Stream.write`: half of its bytes have come, or have gone."""
    real, large = getattr(Stream, way), count(1)

    def half(self: Stream, buffers: Sequence[memoryview], deadline: float) -> None:
        size = sum(map(len, buffers))
        if size < LARGE or next(large) != number:
            real(self, buffers, deadline)
            return
        left, part = size // 2, []
        for buffer in buffers:
            part.append(buffer[:left])
            left -= len(part[-1])
        real(self, part, deadline)
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Stream, way, half):
        yield


@contextmanager
def stopped(push: int) -> Iterator[None]:
    """The process that tells the coordinator of this worker's so-manieth push stops itself (SIGSTOP) just before."""
    real, keys = Station.send, set[m.Key]()

    def send(self: Station, to: Address, what: m.Message, tensors: Any = ()) -> None:
        if isinstance(what, m.Push) and what.key not in keys:
            keys.add(what.key)
            if len(keys) == push:
                os.kill(os.getpid(), signal.SIGSTOP)
        real(self, to, what, tensors)

    with mock.patch.object(Station, "send", send):
        yield


@contextmanager
def apart(version: int) -> Iterator[None]:
    """Shard 0 is killed when the first of a worker's ranks has pulled this version, or the first after it, and before
    the second has, who has no connection with it then: it pulls from another life of that shard."""
    real, left = Other.pull, [1]

    def pull(self: Other, command: Any, primaries: tuple[int, ...]) -> Any:
        if command.version >= version and left:
            left.clear()
            time.sleep(0.3)
            self.station.drop(Address("shard", 0, primaries[0]))
            for pid in _named("shoal-server0"):
                os.kill(pid, signal.SIGKILL)
        return real(self, command, primaries)

    with mock.patch.object(Other, "pull", pull):
        yield


def _named(name: str) -> list[int]:
    """Live processes that have the parent of this one, by how their names begin."""
    found = []
    for pid in sockets.family(os.getppid()):
        try:
            with open(f"/proc/{pid}/comm") as file:
                if file.read().startswith(name) and sockets.alive(pid):
                    found.append(pid)
        except OSError:
            continue
    return found


@contextmanager
def awaiting(folder: Path, worker: int) -> Iterator[None]:
    """Its fourth gradient is not begun before this worker has joined, as the journal says; its lease goes on."""
    real, gradients = work._batches, count(1)

    def batches(*given: Any) -> Any:
        fourth = next(gradients) == 4
        while fourth:
            records = journal.decode((folder / "server/journal").read_bytes())[0]
            if any(isinstance(record, r.Entered) and record.worker == worker for record in records):
                break
            time.sleep(0.05)
        return real(*given)

    with mock.patch.object(work, "_batches", batches):
        yield
