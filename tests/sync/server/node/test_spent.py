"""What a worker says that its pushes have cost: nothing is forgotten of those that were void before they went out."""

from __future__ import annotations

import types
from typing import Any, cast

import pytest
import torch

from shoal.sync.server import messages as m
from shoal.sync.server.messages import Key, Range
from shoal.sync.server.node import work
from shoal.sync.server.node.work import Server, Work


class Client:
    """Of a worker without shards: its pushes are void, accepted or rejected, as the test says."""

    def __init__(self, fates: str):
        self.fates, self.told, self.moved = list(fates), list[m.Spent](), 0
        self.station = types.SimpleNamespace(traffic=self.traffic)

    def traffic(self) -> tuple[int, int]:
        """10 bytes and 100 more each time."""
        self.moved += 10
        return self.moved, 10 * self.moved

    def granted(self) -> None:
        return None

    def push(self, key: Key, *push: Any) -> bool:
        self.fate = self.fates.pop(0)
        if self.fate == "v":
            return False
        self.told += [each for each in push if isinstance(each, m.Spent)]
        return True

    def wait(self, *states: str, timeout: float | None) -> str:
        return "asking"

    def missing(self) -> list[tuple[int, int]]:
        return []

    def answer(self, key: Key) -> m.Answer:
        return m.Answer(key, self.fate == "a", 1, 0)


def worker(monkeypatch: pytest.MonkeyPatch, client: Client, now: list[float]) -> Server:
    """On one rank. now: its clock."""
    monkeypatch.setattr(work, "Client", lambda *given: client)
    monkeypatch.setattr(work, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    alone = types.SimpleNamespace(ranks_per_replica=1)
    mesh = types.SimpleNamespace(world=1, rank=0, device=torch.device("cpu"), layout=alone)
    replica = types.SimpleNamespace(shards=lambda: [], held=lambda: [])
    machine = types.SimpleNamespace(number=0, follower=None)
    return Server(cast(Any, mesh), cast(Any, replica), [], station=cast(Any, None), machine=cast(Any, machine))


def spent(monkeypatch: pytest.MonkeyPatch, fates: str) -> list[m.Spent]:
    """By clocks, each of which waits for 1 s and computes for 4."""
    client, now = Client(fates), [0.0]
    server = worker(monkeypatch, client, now)
    for clock in range(len(fates)):
        server._waited, server._began = 1.0, now[0]
        now[0] += 4.0
        server.end(Work(Key(0, 0, clock), 0, Range(0, 1)), 1.0, 1.0, memory_gib=clock)
    return client.told


def test_each_push_tells_its_own(monkeypatch):
    """Whether the one before was rejected or not."""
    told = spent(monkeypatch, "ara")
    assert told == [m.Spent(1.0, 4.0, clock, 10, 100, 0.0) for clock in range(3)]


def test_the_next_push_tells_of_those_that_were_void(monkeypatch):
    told = spent(monkeypatch, "avvaa")
    assert told == [m.Spent(1, 4, 0, 10, 100, 0), m.Spent(3, 4, 3, 30, 300, 8), m.Spent(1, 4, 4, 10, 100, 0)]


class Granting(Client):
    """Of a worker that hears of its grant after 10 s, and has the weights 2 s later."""

    def __init__(self, fates: str, now: list[float]):
        super().__init__(fates)
        self.now = now

    def wait(self, *states: str, timeout: float | None) -> str:
        if "asking" not in states:
            self.now[0] += 10.0
        return "computing"

    def granted(self) -> Any:
        grant = m.Grant(Key(0, 0, 0), 0, Range(0, 1))
        return types.SimpleNamespace(grant=grant, primaries=(), whole=True)

    def pulled(self, grant: m.Grant) -> dict[int, Any]:
        self.now[0] += 2.0
        return {}


def test_waiting_for_others_to_join_is_no_waiting(monkeypatch):
    """From the second gradient on, all that passes since the last push is."""
    now = [0.0]
    server = worker(monkeypatch, client := Granting("aa", now), now)
    for _ in range(2):
        work_ = server.begin()
        assert work_ is not None
        now[0] += 4.0
        server.end(work_, 1.0, 1.0)
    assert [(each.waited, each.computed) for each in client.told] == [(2.0, 4.0), (12.0, 4.0)]
