"""Mailboxes over loopback: who is called, who is lost, who comes back, and who is not let in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server.messages import COORDINATOR, Address, Key, Piece, Range
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.station import Lost, Said, Station
from shoal.sync.server.wire import Connection, Credentials, connect
from shoal.sync.server.wire.frame import pack
from tests.sync.server.peers import TOKEN, TRUSTED

WORKER, SHARD = Address("worker", 3, 12345), Address("shard", 1, 2)
PIECES = (Piece("embed", (2, 0), (3, 2)), Piece("scale", (), ()))
STAGE = m.Stage(Key(3, 0, 0), 0, 1, PIECES)
PATIENCE = 30.0

Make = Callable[..., Station]


@pytest.fixture
def station(tmp_path) -> Iterator[Make]:
    """station(address, listens=..., calls=...): closed at the end."""
    made: list[Station] = []

    def make(
        me: Address, *, listens: bool = False, calls: tuple[str, ...] = (), token: str = TOKEN, most: int = 1 << 50
    ) -> Station:
        made.append(Station(me, Book(tmp_path), Credentials(token), torch.float32, calls))
        if listens:
            made[-1].listen("127.0.0.1", most=most)
        return made[-1]

    yield make
    for each in made:
        each.close(flush=0.0)


def heard(station: Station) -> Said | Lost:
    """What it hears of next."""
    event = station.next(PATIENCE)
    assert event is not None, "nothing has come"
    return event


def said(station: Station) -> Said:
    event = heard(station)
    assert isinstance(event, Said), event
    return event


def silent(station: Station) -> bool:
    return station.next(0.3) is None


def test_two_sides_talk_with_tensors_in_order(station):
    shard, worker = station(SHARD, listens=True), station(WORKER, calls=("shard",))
    tensors = torch.arange(6.0).reshape(2, 3).T, torch.tensor(0.5)
    stages = [msgspec.structs.replace(STAGE, key=Key(2, 0, clock)) for clock in range(3)]
    for stage in stages:
        worker.send(SHARD, stage, tensors)
        worker.send(SHARD, m.Drop((stage.key,)))
    for stage in stages:
        sender, message, found = said(shard)
        assert (sender, message) == (WORKER, stage)
        assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
        assert said(shard) == (WORKER, m.Drop((stage.key,)), [])
    shard.send(WORKER, m.Over())
    assert said(worker) == (SHARD, m.Over(), [])
    assert worker.traffic()[0] > 3 * 28 < shard.traffic()[1]


def test_what_is_given_back_is_received_into_again_and_nothing_else_is(station):
    """Large enough to be kept."""
    shard, worker = station(SHARD, listens=True), station(WORKER, calls=("shard",))
    pieces = (Piece("embed", (0, 0), (300, 300)),)
    gradients = [torch.full((300, 300), float(number)) for number in range(4)]
    heard_of = []
    for number, gradient in enumerate(gradients):
        worker.send(SHARD, msgspec.structs.replace(STAGE, key=Key(2, 0, number), pieces=pieces), [gradient])
        heard_of.append(said(shard).tensors[0])
        assert torch.equal(heard_of[-1], gradient)
        if number == 1:
            shard.give_back([heard_of[1]])
    places = [tensor.data_ptr() for tensor in heard_of]
    assert places[2] == places[1]
    assert len({*places}) == 3
    assert torch.equal(heard_of[0], gradients[0]), "it was not given back"


def test_what_is_said_again_while_it_still_waits_goes_once(station):
    """On a slow line patience ends before a gradient has gone: it must not be sent again behind itself."""
    worker = station(WORKER, calls=("shard",))
    tensors = torch.arange(6.0).reshape(2, 3).T, torch.tensor(0.5)
    other = msgspec.structs.replace(STAGE, key=Key(2, 0, 99))
    for stage in (STAGE, other, STAGE, other):
        worker.send(SHARD, stage, tensors)
    shard = station(SHARD, listens=True)
    assert [said(shard).message, said(shard).message] == [STAGE, other]
    assert silent(shard)
    worker.send(SHARD, STAGE, tensors)
    assert said(shard).message == STAGE, "once it has gone, it may go again"


def test_whom_nobody_calls_and_who_is_not_there_gets_nothing(station, tmp_path, monkeypatch):
    shard = station(SHARD, listens=True)
    shard.send(WORKER, m.Over())
    assert silent(shard), "it calls no workers"
    monkeypatch.setattr("shoal.sync.server.node.station._PATIENCE", 0.3)
    worker = station(WORKER, calls=("shard", "coordinator"))
    worker.send(COORDINATOR, m.Look())
    assert heard(worker) == Lost(COORDINATOR)


def test_a_side_that_begins_anew_is_found_where_it_listens_then(station):
    """The messages in between are lost; the machines say them again."""
    worker = station(WORKER, calls=("shard",))
    worker.send(SHARD, m.Drop(()))
    shard = station(SHARD, listens=True)
    assert said(shard).sender == WORKER, "what was said before it listened is kept"
    shard.close()
    assert heard(worker) == Lost(SHARD)
    again = station(SHARD, listens=True)
    worker.send(SHARD, m.Drop((STAGE.key,)))
    assert said(again).message == m.Drop((STAGE.key,))
    # The caller goes away, and comes under the same name and under another.
    worker.drop(SHARD)
    assert heard(again) == Lost(WORKER)
    worker.send(SHARD, m.Drop(()))
    assert said(again).sender == WORKER
    new = WORKER._replace(copy=99)
    worker.rename(new)
    assert heard(again) == Lost(WORKER)
    worker.send(SHARD, m.Drop(()))
    assert said(again).sender == new


def test_who_calls_again_before_its_loss_is_known_is_not_lost(station):
    shard = station(SHARD, listens=True)
    first, second = (station(WORKER, calls=("shard",)) for _ in range(2))
    first.send(SHARD, m.Drop(()))
    assert said(shard).sender == WORKER
    second.send(SHARD, m.Drop(()))
    assert said(shard).sender == WORKER, "the latter takes its place"
    assert heard(first) == Lost(SHARD)
    assert silent(shard)
    shard.send(WORKER, m.Over())
    assert said(second).message == m.Over()


def test_another_token_is_a_loss_that_says_why(station):
    shard = station(SHARD, listens=True)
    worker = station(WORKER, calls=("shard",), token="another token of enough bytes")
    worker.send(SHARD, m.Drop(()))
    lost = heard(worker)
    assert isinstance(lost, Lost)
    assert lost.address == SHARD
    assert isinstance(lost.error, JobError)
    assert "token" in lost.error.what
    assert silent(shard)


def stranger(shard: Station, tmp_path: Path, name: str) -> Connection:
    """Somebody who knows the token, and no more."""
    entry = Book(tmp_path).find(shard.me)
    assert entry is not None
    return connect(entry.host, entry.port, credentials=TRUSTED, name=name, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("reason", "header", "buffers"),
    [
        ("no message", b"hello", []),
        ("no message", m.encode(STAGE)[:-3], []),
        ("does not fit", m.encode(STAGE), [bytes(24)]),
        ("does not fit", m.encode(STAGE), [bytes(24), bytes(8)]),
        ("does not fit", m.encode(m.Over()), [bytes(4)]),
        ("does not fit", m.encode(m.Stage(STAGE.key, 0, 1, (Piece("huge", (0,), (1 << 50,)),))), [bytes(4)]),
        ("does not fit", m.encode(m.Stage(STAGE.key, 0, 1, (Piece("less", (0, 0), (-1, -1)),))), [bytes(4)]),
    ],
)
def test_what_is_no_message_ends_its_connection_and_nothing_else(station, tmp_path, reason, header, buffers):
    shard, worker = station(SHARD, listens=True), station(WORKER, calls=("shard",))
    worker.send(SHARD, m.Drop(()))
    assert said(shard).sender == WORKER
    other = Address("worker", 4, 1)
    with stranger(shard, tmp_path, "worker 4 1") as connection:
        connection.send(m.encode(m.Drop(())), [], timeout=PATIENCE)
        assert said(shard).sender == other
        connection.send(header, buffers, timeout=PATIENCE)
        assert heard(shard) == Lost(other)
    assert shard._listener is not None
    _eventually(lambda: shard._listener.ended == {reason: 1})
    worker.send(SHARD, m.Drop(()))
    assert said(shard).sender == WORKER


def test_more_than_is_taken_at_a_time_and_more_than_there_is_memory_end_their_connection(station, tmp_path):
    huge = m.Stage(STAGE.key, 0, 1, (Piece("huge", (0,), (1 << 47,)),))
    for most, reason in ((32, "too large"), (1 << 50, "no memory")):
        shard, worker = station(SHARD, listens=True, most=most), station(WORKER, calls=("shard",))
        worker.send(SHARD, STAGE, [torch.ones(3, 2), torch.ones(())])
        assert len(said(shard).tensors) == 2
        with stranger(shard, tmp_path, "worker 4 1") as connection:
            # Of so many bytes, and none of them: told in the header alone.
            head = pack(connection._session.send_key, 0, m.encode(huge), [1 << 49])
            connection._stream.write([head], time.monotonic() + PATIENCE)
            assert heard(shard) == Lost(Address("worker", 4, 1))
        assert shard._listener is not None
        _eventually(lambda shard=shard, reason=reason: shard._listener.ended == {reason: 1})
        worker.send(SHARD, m.Drop(()))
        assert said(shard).sender == WORKER
        worker.close()
        shard.close()


@pytest.mark.parametrize("name", ["", "worker", "worker 1", "worker one 1", "thief 1 1", "worker 1 1 1"])
def test_a_name_that_is_none_is_not_let_in(station, tmp_path, name):
    shard = station(SHARD, listens=True)
    with stranger(shard, tmp_path, name) as connection, pytest.raises(ConnectionError):
        connection.receive(timeout=PATIENCE)
    _eventually(lambda: shard._listener.ended == {"no name": 1})
    assert silent(shard)


def _eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nothing_is_heard_of_connections_that_this_side_ends(station):
    shard, worker = station(SHARD, listens=True), station(WORKER, calls=("shard",))
    worker.send(SHARD, m.Ask(STAGE.key))
    assert said(shard).sender == WORKER
    shard.drop(WORKER)
    assert silent(shard)
    assert heard(worker) == Lost(SHARD)
    worker.close()
    worker.send(SHARD, m.Push(STAGE.key, 0, 1.0, 0.0, Range(0, 1)))
    assert silent(shard)
