"""Readers: the weights of one version while commits go on, in copies that are counted, and at whatever pace."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from shoal.errors import JobError, RankError
from shoal.job.optim import OptimOptions
from shoal.sync.server import messages as m
from shoal.sync.server.effects import Send
from shoal.sync.server.messages import COORDINATOR, Address, Key, Piece
from shoal.sync.server.node import read
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.read import Reader
from shoal.sync.server.node.serve import Serving
from shoal.sync.server.node.station import Said, Station
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import Block
from shoal.sync.server.pulls import READERS
from shoal.sync.server.rules import Rules
from shoal.sync.server.shard import ServerShard
from shoal.sync.server.wire import Credentials

ONE = Address("reader", 0, 1)
TOKEN = Credentials("a token that this job alone knows")
VALUES = {"a": torch.arange(12.0).reshape(6, 2)}
WHOLE = (Piece("a", (0, 0), (6, 2)),)
SGD = OptimOptions(name="sgd", momentum=0.0, weight_decay=0.0)


def shard(level: str = "snapshot", number: int = 0, name: str = "a", **rules) -> ServerShard:
    held = blocks({name: VALUES["a"]}, [Block(name, 0, 6)])
    return ServerShard(number, Parameters(held, Rules("asp", **rules), SGD, 10), level=level)


def stage(server: ServerShard, clock: int) -> Key:
    """Every push takes 1 from every weight."""
    key = Key(0, 0, clock)
    server.handle(Address("worker", 0, 1), m.Stage(key, 0, 1, WHOLE), (torch.ones(6, 2),), 0.0)
    return key


def apply(server: ServerShard, version: int, key: Key) -> list[Send]:
    return answers(server.handle(COORDINATOR, m.Apply(version, (key,), 1.0, 1.0, 0), (), 0.0))


def pull(server: ServerShard, version: int, reader: Address = ONE) -> list[Send]:
    return answers(server.handle(reader, m.Pull(Key(0, 0, 0), version, None, True), (), 0.0))


def answers(effects) -> list[Send]:
    return [each for each in effects if isinstance(each, Send) and isinstance(each.message, m.Pulled | m.Gone)]


@pytest.mark.parametrize("level", ["snapshot", "shard", "hogwild"])
def test_a_version_to_come_is_given_as_it_was_though_the_next_is_applied_with_it(level):
    server = shard(level)
    one, two = stage(server, 0), stage(server, 1)
    assert pull(server, 1) == []
    assert apply(server, 2, two) == []
    (given,) = apply(server, 1, one)
    assert server.version == 2
    assert (given.to, given.message.version) == (ONE, 1)
    assert torch.equal(given.tensors[0], VALUES["a"] - 1)


@pytest.mark.parametrize("level", ["snapshot", "shard", "hogwild"])
def test_a_version_that_is_over_is_gone_and_the_latest_is_a_copy(level):
    server = shard(level)
    one, two = stage(server, 0), stage(server, 1)
    apply(server, 1, one)
    assert pull(server, 0)[0].message == m.Gone(Key(0, 0, 0), 0, 0, 1)
    (given,) = pull(server, 1)
    apply(server, 2, two)
    assert torch.equal(given.tensors[0], VALUES["a"] - 1)


def test_readers_get_the_weights_that_move_not_those_that_look_ahead():
    held = blocks(VALUES, [Block("a", 0, 6)])
    momentum = OptimOptions(name="sgd", momentum=0.9, weight_decay=0.0)
    rules = Rules("asp", workers=3, compensation="look-ahead")
    server = ServerShard(0, Parameters(held, rules, momentum, 10))
    apply(server, 1, stage(server, 0))
    worker = server.handle(Address("worker", 0, 1), m.Pull(Key(0, 0, 1), 1), (), 0.0)[0].tensors[0]
    assert not torch.equal(worker, VALUES["a"] - 1)
    assert torch.equal(pull(server, 1)[0].tensors[0], VALUES["a"] - 1)


def test_so_many_copies_for_readers_and_one_for_each_until_its_connection_ends():
    server = shard()
    readers = [Address("reader", 0, i) for i in range(READERS + 1)]
    for reader in readers[:-1]:
        assert isinstance(pull(server, 0, reader)[0].message, m.Pulled)
    assert pull(server, 0, readers[-1])[0].message == m.Gone(Key(0, 0, 0), 0, 0, 0)
    server.lost(readers[0])
    assert isinstance(pull(server, 0, readers[-1])[0].message, m.Pulled)
    server.lost(readers[1])
    assert isinstance(pull(server, 0, readers[-1])[0].message, m.Gone)


def test_a_reader_that_left_is_not_waited_for():
    server = shard()
    pull(server, 1)
    server.lost(ONE)
    assert apply(server, 1, stage(server, 0)) == []


class Live:
    """A coordinator that commits at a pace of its own, and two shards: all that a reader meets of a job."""

    def __init__(self, folder, pause: float, *, until: int = 1 << 30, late: float = 0.0):
        """pause: seconds between commits. until: the last of them. late: seconds by which the second shard hears of
        each later than the first."""
        self.book, self.pause, self.until, self.late = Book(folder), pause, until, late
        self.version, self._ended = 0, threading.Event()
        self.machines = [shard(number=0, name="a"), shard(number=1, name="b")]
        self.stations = [self._station(Address("shard", i), ("coordinator",)) for i in range(2)]
        self.coordinator = self._station(COORDINATOR)
        self.heard: set[Address] = set()

    def _station(self, me: Address, calls=()) -> Station:
        station = Station(me, self.book, TOKEN, torch.float32, calls)
        station.listen("127.0.0.1")
        return station

    def __enter__(self):
        none = {"save": lambda version, values: None, "poll": lambda: ()}
        runs = [Serving(m_, s, None, **none).run for m_, s in zip(self.machines, self.stations, strict=True)]
        self.threads = [threading.Thread(target=work, daemon=True) for work in (*runs, self._lead)]
        for thread in self.threads:
            thread.start()
        while len(self.heard) < 2:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self._ended.set()
        self.coordinator.wake()
        for thread in self.threads:
            thread.join(10.0)
        for station in (*self.stations, self.coordinator):
            station.close()

    def _lead(self):
        due = time.monotonic()
        while not self._ended.is_set():
            event = self.coordinator.next(max(0.0, due - time.monotonic()))
            if isinstance(event, Said) and isinstance(event.message, m.Look):
                self.coordinator.send(event.sender, m.Seen(self.version, 0, (0, 0)))
            elif isinstance(event, Said) and isinstance(event.message, m.Hello):
                self.heard.add(event.sender)
            if time.monotonic() >= due and len(self.heard) == 2:
                due = time.monotonic() + self.pause
                if self.version < self.until:
                    self._commit()
        for number in range(2):
            self.coordinator.send(Address("shard", number), m.Over())

    def _commit(self):
        self.version += 1
        key = Key(0, 0, self.version)
        for number, name in enumerate("ab"):
            to = Address("shard", number)
            time.sleep(self.late * number)
            self.coordinator.send(to, m.Stage(key, 0, 1, (Piece(name, (0, 0), (6, 2)),), True), (torch.ones(6, 2),))
            self.coordinator.send(to, m.Apply(self.version, (key,), 1.0, 1.0, 0))

    def reader(self, token: Credentials = TOKEN) -> Station:
        return Station(Address("reader"), self.book, token, torch.float32, ("coordinator", "shard"))


@pytest.mark.parametrize(("pause", "until", "late"), [(0.01, 1 << 30, 0.005), (30.0, 1 << 30, 0.0), (0.002, 40, 0.0)])
def test_all_shards_give_the_same_version_at_any_pace_and_where_training_stands_still(tmp_path, pause, until, late):
    with Live(tmp_path, pause, until=until, late=late) as job, job.reader() as station:
        for _ in range(3):
            found = Reader(station, print).read()
            assert [told.version for told, _ in found.parts] == [found.version] * 2
            assert [told.pieces[0].name for told, _ in found.parts] == ["a", "b"]
            for _, tensors in found.parts:
                assert torch.equal(tensors[0], VALUES["a"] - found.version)


class Scripted:
    """In the place of a station: one shard that is always 3 commits past what is asked, until that is `far` ahead."""

    def __init__(self, far: int, full: int = 0):
        """full: times that other readers have all places first."""
        self.far, self.full = far, full
        self.book = Book(Path("run"))
        self.asked: list[int] = []
        self._events: list[Said] = []

    def rename(self, me: Address) -> None:
        pass

    def traffic(self) -> tuple[int, int]:
        return 0, 0

    def send(self, to: Address, message: m.Message) -> None:
        if isinstance(message, m.Look):
            self._events.append(Said(to, m.Seen(100, 0, (0,)), ()))
            return
        self.asked.append(message.version)
        past = 0 if len(self.asked) <= self.full else 3
        if message.version - 100 < self.far or not past:
            answer = m.Gone(message.key, 0, message.version, message.version + past)
        else:
            answer = m.Pulled(message.key, 0, message.version, ())
        self._events.append(Said(to, answer, ()))

    def next(self, timeout: float) -> Said | None:
        return self._events.pop(0) if self._events else None


def test_a_reader_that_comes_too_late_asks_for_what_is_further_and_further_ahead(monkeypatch):
    monkeypatch.setattr(read.time, "sleep", lambda seconds: None)
    station = Scripted(far=40)
    assert Reader(station, print).read().version == 142
    assert station.asked == [100, 106, 118, 142]
    station = Scripted(far=0, full=2)
    assert Reader(station, print).read().version == 100
    assert station.asked == [100, 100, 100]
    station = Scripted(far=1 << 40)
    with pytest.raises(RankError, match="in 10 attempts"):
        Reader(station, print).read()


def test_a_version_that_never_comes_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_STILL", 0.3)
    with Live(tmp_path, 0.01, until=5) as job, job.reader() as station:
        while job.version < 5:
            time.sleep(0.01)
        reader = Reader(station, print)
        assert reader._pull(reader._look(), 8, Key(0, 0, 99)) == (0, 0.0)


def test_who_does_not_know_the_token_is_told_so(tmp_path):
    other = Credentials("another token, of another job")
    with Live(tmp_path, 30.0) as job, job.reader(other) as station, pytest.raises(JobError, match="token"):
        Reader(station, print).read()


def test_a_shard_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_PATIENCE", 0.9)
    monkeypatch.setattr(read, "_SOON", 0.3)
    told = []
    with Live(tmp_path, 30.0) as job, job.reader() as station:
        job.machines[1].pulls.pull = lambda sender, message, version: []
        with pytest.raises(RankError, match=r"server shard 1 has not answered for") as caught:
            Reader(station, told.append).read()
        assert told == ["waits for server shard 1, at most 1 s"]
        assert "for whom it waits" in caught.value.fix
