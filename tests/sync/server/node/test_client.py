"""A worker's side of the connections: fenced, it joins again by itself, and what it was computing is void."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shoal.errors import JobError, RankError
from shoal.sync.server import messages as m
from shoal.sync.server.messages import COORDINATOR, Address, Key, Piece, Range
from shoal.sync.server.node import silence
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.client import Client
from shoal.sync.server.node.station import Said, Station
from shoal.sync.server.worker import Pushed, Worker
from tests.sync.server.peers import TRUSTED

PATIENCE = 30.0
PIECES = (Piece("w", (0,), (2,)),)
WEIGHTS, GRADIENT = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])


class Peers:
    """Coordinator and the only shard, played by the test."""

    def __init__(self, folder: Path):
        self.book = Book(folder)
        self.lead, self.shard = (self._station(who) for who in (COORDINATOR, Address("shard", 0, 0)))

    def _station(self, who: Address) -> Station:
        station = Station(who, self.book, TRUSTED, torch.float32, ())
        station.listen("127.0.0.1")
        return station

    def client(self, leaving: Callable[[], bool] = lambda: False) -> Client:
        call = ("coordinator", "shard")
        return Client(
            Worker(0, 4, 1, model="m", tokenizer="t", retry=0.5, heartbeat=60.0, wanted={0: PIECES}),
            lambda nonce: Station(Address("worker", 0, nonce), self.book, TRUSTED, torch.float32, call),
            leaving,
        )

    def hear(self, station: Station, kind: type[m.Message]) -> Said:
        """The next message of this kind; others, which may be repeated, are passed over."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            event = station.next(1.0)
            if isinstance(event, Said) and isinstance(event.message, kind):
                return event
        raise AssertionError(f"no {kind.__name__}")

    def join(self, incarnation: int, pulling: Callable[[], None] = lambda: None) -> m.Join:
        """Lets the worker in, until it has weights of version 0 and samples 0 … 3. pulling: called before they come."""
        sender, join, _ = self.hear(self.lead, m.Join)
        assert isinstance(join, m.Join)
        assert sender.copy == join.nonce
        self.lead.send(sender, m.Joined(0, join.nonce, incarnation, 0, 0, (0,)))
        key = Key(0, incarnation, 0)
        assert self.hear(self.lead, m.Ask).message == m.Ask(key)
        self.lead.send(sender, m.Grant(key, 0, Range(0, 4)))
        asker, pull, _ = self.hear(self.shard, m.Pull)
        assert isinstance(pull, m.Pull)
        assert (pull.key, pull.pieces) == (key, PIECES)
        pulling()
        self.shard.send(asker, m.Pulled(key, 0, 0, PIECES), (WEIGHTS,))
        return join


@pytest.fixture
def peers(tmp_path) -> Iterator[Peers]:
    peers = Peers(tmp_path)
    yield peers
    for station in (peers.lead, peers.shard):
        station.close(flush=0.0)


def push(client: Client, key: Key, owes: bool = False) -> bool:
    return client.push(key, {0: Pushed(PIECES, (GRADIENT,))}, 3.0, 1.0, Range(0, 4), 1, m.UNKNOWN, owes)


def test_a_fenced_worker_joins_again_and_its_work_is_void(peers):
    client = peers.client()
    try:
        first = peers.join(0)
        assert client.wait("computing", timeout=PATIENCE) == "computing"
        old = Key(0, 0, 0)
        granted = client.granted()
        assert granted is not None
        pulled = client.pulled(granted.grant)
        assert pulled is not None
        assert torch.equal(pulled[0][1][0], WEIGHTS)
        peers.lead.send(Address("worker", 0, first.nonce), m.Fenced(0, 0))
        second = peers.join(1)
        assert second.nonce != first.nonce
        assert client.wait("computing", timeout=PATIENCE) == "computing"
        assert client.pulled(granted.grant) is None
        assert not push(client, old)
        assert client.answer(old) is None
        new = Key(0, 1, 0)
        assert push(client, new)
        sender, stage, (gradient,) = peers.hear(peers.shard, m.Stage)
        assert isinstance(stage, m.Stage)
        assert (stage.key, sender.copy) == (new, second.nonce)
        assert torch.equal(gradient, GRADIENT)
        answer = m.Answer(new, True, 1, 0)
        peers.lead.send(sender, answer)
        assert client.wait("asking", timeout=PATIENCE) == "asking"
        assert client.answer(new) == answer
        assert client.answer(old) is None
    finally:
        client.close()
    assert peers.hear(peers.lead, m.Leave).message == m.Leave(0, 1)


def test_weights_of_a_later_grant_are_not_taken_for_those_of_an_earlier_one(peers):
    """Other ranks of the worker pull what the first grant says."""
    client = peers.client()
    try:
        first = peers.join(0)
        assert client.wait("computing", timeout=PATIENCE) == "computing"
        granted = client.granted()
        assert granted is not None
        client.not_pulled(granted.grant)
        worker, key = Address("worker", 0, first.nonce), Key(0, 0, 0)
        assert peers.hear(peers.lead, m.Ask).message == m.Ask(key, 1)
        newer = m.Grant(key, 3, Range(0, 4), 1)
        peers.lead.send(worker, newer)
        peers.hear(peers.shard, m.Pull)
        peers.shard.send(worker, m.Pulled(key, 0, 3, PIECES), (WEIGHTS,))
        assert client.wait("computing", timeout=PATIENCE) == "computing"
        assert client.pulled(granted.grant) is None
        client.not_pulled(granted.grant)
        assert client.wait("computing", timeout=0.0) == "computing", "it has a newer one already"
        assert client.pulled(newer) is not None
    finally:
        client.close()


@pytest.mark.parametrize("by", ["coordinator", "shard"])
def test_a_refusal_is_raised_where_one_waits(peers, by):
    client = peers.client()
    try:
        if by == "coordinator":
            sender, join, _ = peers.hear(peers.lead, m.Join)
            assert isinstance(join, m.Join)
            peers.lead.send(sender, m.Refused(join.nonce, "worker 0 has another model", "take this one"))
        else:
            peers.join(0)
            assert client.wait("computing", timeout=PATIENCE) == "computing"
            assert push(client, Key(0, 0, 0))
            sender, _, _ = peers.hear(peers.shard, m.Stage)
            peers.shard.send(sender, m.Refused(0, "worker 0 has another model", "take this one"))
        with pytest.raises(JobError, match="another model") as caught:
            client.wait("finished", timeout=PATIENCE)
        assert caught.value.fix == "take this one"
    finally:
        client.close()


def test_without_a_coordinator_it_gives_up_in_the_end(peers, monkeypatch):
    monkeypatch.setattr(silence, "ALONE", 0.3)
    client = peers.client()
    try:
        with pytest.raises(RankError, match="has not been heard of"):
            client.wait("asking", timeout=PATIENCE)
    finally:
        client.close()


class Clock:
    """The time of a client, which passes at once when the test says so."""

    def __init__(self) -> None:
        self._later, self._looks = 0.0, 0

    def monotonic(self) -> float:
        self._looks += 1
        return time.monotonic() + self._later

    def passes(self, client: Client, seconds: float) -> None:
        """Returns when the client has seen it in a whole turn of its thread, or has given up."""
        self._later += seconds
        seen, deadline = self._looks + 3, time.monotonic() + PATIENCE
        while self._looks < seen and client._error is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_neither_a_long_pull_nor_a_long_gradient_is_silence_of_the_coordinator(peers, monkeypatch):
    """It has nothing to say to a worker that is at one; when that has pushed, there is time to answer."""
    clock = Clock()
    monkeypatch.setattr("shoal.sync.server.node.client.time", clock)
    client = peers.client()
    try:
        peers.join(0, pulling=lambda: clock.passes(client, 2 * silence.ALONE))
        assert client.wait("computing", timeout=PATIENCE) == "computing"
        clock.passes(client, 2 * silence.ALONE)
        assert push(client, Key(0, 0, 0))
        sender, _, _ = peers.hear(peers.lead, m.Push)
        clock.passes(client, 0.5 * silence.ALONE)
        peers.lead.send(sender, m.Answer(Key(0, 0, 0), True, 1, 0))
        assert client.wait("asking", timeout=PATIENCE) == "asking"
    finally:
        client.close()


@pytest.mark.parametrize("silent", ["from the beginning", "later"])
def test_who_is_asked_to_leave_and_holds_no_gradient_does_not_wait_for_a_coordinator_that_is_gone(
    peers, monkeypatch, silent
):
    monkeypatch.setattr(silence, "_SOON", 0.2)
    asked: list[bool] = []
    client = peers.client(leaving=lambda: bool(asked))
    try:
        if silent == "later":
            peers.join(0)
            assert client.wait("computing", timeout=PATIENCE) == "computing"
            granted = client.granted()
            assert granted is not None
            client.not_pulled(granted.grant)
            peers.lead.close(flush=0.0)
        asked.append(True)
        assert client.wait("finished", timeout=PATIENCE) == "finished"
    finally:
        client.close()


def test_who_holds_a_gradient_waits_for_the_coordinator_though_it_is_asked_to_leave(peers, monkeypatch):
    monkeypatch.setattr(silence, "_SOON", 0.0)
    asked: list[bool] = []
    client = peers.client(leaving=lambda: bool(asked))
    try:
        peers.join(0)
        assert client.wait("computing", timeout=PATIENCE) == "computing"
        asked.append(True)
        assert push(client, Key(0, 0, 0))
        peers.lead.close(flush=0.0)
        assert client.wait("finished", timeout=0.5) == "pushing"
    finally:
        client.close()


def test_who_owes_what_a_codec_lost_waits_for_the_coordinator_though_it_is_asked_to_leave(peers, monkeypatch):
    """That of gradients that were accepted is still to be pushed: without it, they would never count in full."""
    monkeypatch.setattr(silence, "_SOON", 0.0)
    asked: list[bool] = []
    client = peers.client(leaving=lambda: bool(asked))
    try:
        peers.join(0)
        assert client.wait("computing", timeout=PATIENCE) == "computing"
        assert push(client, Key(0, 0, 0), owes=True)
        sender, _, _ = peers.hear(peers.lead, m.Push)
        peers.lead.send(sender, m.Answer(Key(0, 0, 0), True, 1, 0))
        assert client.wait("asking", timeout=PATIENCE) == "asking"
        peers.lead.close(flush=0.0)
        asked.append(True)
        assert client.wait("finished", timeout=0.5) == "asking"
    finally:
        client.close()
