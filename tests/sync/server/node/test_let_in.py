"""Parts with another token, or with TLS on one side only: both sides say so, and the one outside ends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server.messages import COORDINATOR, Address
from shoal.sync.server.node import station as stations
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.refusals import Refusals
from shoal.sync.server.node.serve import Serving
from shoal.sync.server.node.station import Lost, Said, Station
from shoal.sync.server.wire import Credentials
from tests.sync.server.peers import TRUSTED
from tests.sync.server.test_reading import shard

OTHER = Credentials("another token of enough bytes")
PATIENCE = 30.0


@contextlib.contextmanager
def mailbox(run: Path, me: Address, credentials: Credentials = TRUSTED) -> Iterator[Station]:
    with Station(me, Book(run), credentials, torch.float32, ("coordinator",)) as station:
        yield station


def serve(station: Station) -> None:
    machine = shard(number=0, name="a")
    Serving(machine, station, None, save=lambda version, values: None, poll=tuple).run()


@contextlib.contextmanager
def shut() -> Iterator[tuple[str, int]]:
    """Where somebody listens who ends each connection, as one with TLS does where this side has none."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:

        def main() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=main, daemon=True).start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)


def test_a_shard_with_another_token_ends_and_the_coordinator_says_whom_it_refuses(tmp_path):
    said: list[str] = []
    with mailbox(tmp_path, COORDINATOR) as lead, mailbox(tmp_path, Address("shard", 0, 0), OTHER) as station:
        lead.listen("127.0.0.1", Refusals(said.append))
        with pytest.raises(JobError, match="refuses this side's job token") as caught:
            serve(station)
        deadline = time.monotonic() + PATIENCE
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caught.value.where.startswith("coordinator 0 (127.0.0.1:")
    assert caught.value.fix == "give both sides the same token"
    assert len(said) == 1
    assert said[0].startswith("refused: 127.0.0.1:")
    assert said[0].endswith(" does not know the job token; give both sides the same token")


def test_a_shard_that_has_been_let_in_does_not_end_by_whoever_listens_there_later(tmp_path):
    """The coordinator may be started again elsewhere, and another run's at its port."""
    with mailbox(tmp_path, Address("shard", 0, 0)) as station:
        refused = JobError("the listener refuses this side's job token")
        for event in (Said(COORDINATOR, m.Kept(0), ()), Lost(COORDINATOR, refused), Said(COORDINATOR, m.Over(), ())):
            station.inbox.put(event)
        serve(station)


def test_one_sided_tls_ends_in_a_loss_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(stations, "_SHUT", 0.5)
    with shut() as address, mailbox(tmp_path, Address("shard", 0, 0)) as station:
        Book(tmp_path).enter(COORDINATOR, *address)
        with pytest.raises(JobError, match=r"the coordinator does not let this side in: .*both use TLS") as caught:
            serve(station)
    assert caught.value.where == str(tmp_path)
    assert "TLS files, or none" in caught.value.fix


def test_who_has_been_let_in_waits_for_a_listener_that_lets_nobody_in(tmp_path, monkeypatch):
    """As behind a tunnel, while what is at its other end starts again."""
    monkeypatch.setattr(stations, "_SHUT", 0.2)
    monkeypatch.setattr(stations, "_PATIENCE", 1.5)
    with shut() as address, mailbox(tmp_path, Address("shard", 0, 0)) as station:
        with mailbox(tmp_path, COORDINATOR) as lead:
            lead.listen("127.0.0.1")
            station.send(COORDINATOR, m.Look())
            assert isinstance(lead.next(PATIENCE), Said)
        assert station.next(PATIENCE) == Lost(COORDINATOR)
        Book(tmp_path).enter(COORDINATOR, *address)
        station.send(COORDINATOR, m.Look())
        assert station.next(PATIENCE) == Lost(COORDINATOR)
