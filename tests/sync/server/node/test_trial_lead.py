"""What the lead of a trial and its parts say to each other, where a part is lost or late: parts made by hand."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator
from queue import Queue

import pytest
import torch

from shoal.device import peer_gone
from shoal.errors import RankError
from shoal.sync.server.node import trial, trial_lead
from shoal.sync.server.node.trial import Here, Links, Tried, Try, attend, receive, send
from shoal.sync.server.node.trial_lead import Gone, Lead, Unreached, choose
from shoal.sync.server.wire import Connection, Listener, connect
from shoal.sync.server.wire.frame import pack
from tests.sync.server.peers import TRUSTED, in_thread, pair

# Seconds for anything that must come to an end.
PATIENCE = 30.0


def test_what_is_told_of_an_earlier_trial_does_not_count():
    """A worker was still at it when another was lost."""
    names = ["worker 0", "worker 1", "server 0"]
    with contextlib.ExitStack() as ending:
        lead = ending.enter_context(Lead(names, "127.0.0.1", TRUSTED))

        def come(name: str) -> Connection:
            found = ending.enter_context(connect(*lead.address, credentials=TRUSTED, name=name, timeout=PATIENCE))
            send(found, Here())
            return found

        first, late, _ = map(come, names)
        lead.gather()
        with in_thread(lambda: lead.exchange("none", [10], 1, True)) as broken:
            assert receive(late) == receive(first)
            # As a process that was started again before anybody knew that the one before it is gone.
            first = come("worker 0")
            assert str(broken.get(timeout=PATIENCE)) == "worker 0"
        with in_thread(lambda: lead.exchange("none", [10], 1, True)) as seconds:
            assert receive(late) == receive(first) == Try(2, "none", (10,), (("", 0),))
            send(late, Tried(1, 9.0))
            send(first, Tried(2, 1.0))
            # Would it count, all had told.
            time.sleep(0.2)
            send(late, Tried(2, 2.0))
            assert seconds.get(timeout=PATIENCE) == 2.0


def test_a_shard_that_is_not_reached_may_turn_out_to_be_lost():
    with contextlib.ExitStack() as ending:
        lead = ending.enter_context(Lead(["worker 0", "server 0"], "127.0.0.1", TRUSTED))
        worker, server = (
            ending.enter_context(connect(*lead.address, credentials=TRUSTED, name=name, timeout=PATIENCE))
            for name in ("worker 0", "server 0")
        )
        for part in (worker, server):
            send(part, Here())
        lead.gather()
        with in_thread(lambda: lead.exchange("none", [10], 1, True)) as broken:
            assert isinstance(receive(worker), Try)
            send(worker, Tried(1, -1.0, "worker 0 cannot connect with server 0"))
            time.sleep(0.2)
            server.close()
            error = broken.get(timeout=PATIENCE)
    assert isinstance(error, Gone)
    assert not isinstance(error, Unreached)
    assert str(error) == "server 0"


def test_a_message_may_be_long_in_coming_but_not_in_between(monkeypatch):
    monkeypatch.setattr(trial, "PATIENCE", 0.2)
    with pair() as (lead, part):
        with in_thread(lambda: receive(part)) as message:
            time.sleep(0.7)
            send(lead, Tried(1, 2.0))
            assert message.get(timeout=PATIENCE) == Tried(1, 2.0)
        with in_thread(lambda: receive(part)) as message:
            head = pack(lead._session.send_key, 1, b"a header", [], None)
            lead._stream.write([memoryview(head)[:-1]], time.monotonic() + PATIENCE)
            error = message.get(timeout=PATIENCE)
    assert isinstance(error, ConnectionError)
    assert "did not end it" in str(error)


def test_while_it_waits_somebody_is_told_who_is_there(monkeypatch):
    monkeypatch.setattr(trial_lead, "_LOOK", 0.05)
    told: Queue[set[str]] = Queue()

    def watch(here: Collection[str]) -> None:
        told.put({*here})

    with (
        Lead(["worker 0", "server 0"], "127.0.0.1", TRUSTED, print, watch) as lead,
        in_thread(lead.gather) as done,
        contextlib.ExitStack() as ending,
    ):
        assert told.get(timeout=PATIENCE) == told.get(timeout=PATIENCE) == set()
        for here in ({"worker 0"}, {"worker 0", "server 0"}):
            (name,) = here - {"worker 0"} or here
            part = ending.enter_context(connect(*lead.address, credentials=TRUSTED, name=name, timeout=PATIENCE))
            send(part, Here())
            while told.get(timeout=PATIENCE) != here:
                pass
        assert done.get(timeout=PATIENCE) is None


def test_who_connects_and_does_not_say_that_it_is_there_is_told_and_let_go(monkeypatch):
    monkeypatch.setattr(trial, "PATIENCE", 0.2)
    said: Queue[str] = Queue()
    with (
        Lead(["worker 0"], "127.0.0.1", TRUSTED, said.put) as lead,
        connect(*lead.address, credentials=TRUSTED, name="worker 0", timeout=PATIENCE) as part,
    ):
        assert "worker 0 (127.0.0.1:" in (line := said.get(timeout=PATIENCE))
        assert "is connected, and has said nothing" in line
        with pytest.raises(ConnectionError):
            receive(part)


@contextlib.contextmanager
def silent() -> Iterator[tuple[str, int]]:
    """Where a shard listens that lets workers in and then says nothing, as a process that was stopped."""
    over = threading.Event()
    with Listener(lambda connection: void(over.wait(PATIENCE)), credentials=TRUSTED) as listener:
        yield listener.address
        over.set()


def void(_: object) -> None:
    """Of what a thread returns."""


def test_a_shard_that_is_silent_is_named_by_the_lead(monkeypatch):
    """Not by the worker, which may be on a machine that nobody watches: it takes part on."""
    monkeypatch.setattr(trial, "PATIENCE", 0.3)
    with contextlib.ExitStack() as ending:
        shard = ending.enter_context(silent())
        lead = ending.enter_context(Lead(["worker 0", "server 0"], "127.0.0.1", TRUSTED))
        links = ending.enter_context(Links("worker 0", TRUSTED, torch.float32))
        server, worker = (
            ending.enter_context(connect(*lead.address, credentials=TRUSTED, name=name, timeout=PATIENCE))
            for name in ("server 0", "worker 0")
        )
        send(server, Here(*shard))
        with in_thread(lambda: attend(worker, Here(), links)) as attended:
            with in_thread(lambda: choose(lead, ["int8"], [1000], 1, True, print)) as chosen:
                error = chosen.get(timeout=PATIENCE)
            lead.end()
            assert attended.get(timeout=PATIENCE) is None
    assert isinstance(error, RankError)
    assert error.what.startswith(f"while links were tried, server 0 (127.0.0.1:{shard[1]}) has not answered worker 0")
    assert "stopped" in error.fix
    assert not peer_gone(error), "nobody is started again for it"


def test_a_worker_that_is_silent_is_said_and_then_named(monkeypatch):
    for name in ("_SOON", "_ANSWER"):
        monkeypatch.setattr(trial_lead, name, 0.2)
    said: list[str] = []
    with contextlib.ExitStack() as ending:
        lead = ending.enter_context(Lead(["worker 0", "server 0"], "127.0.0.1", TRUSTED, said.append))
        for name in ("worker 0", "server 0"):
            part = ending.enter_context(connect(*lead.address, credentials=TRUSTED, name=name, timeout=PATIENCE))
            send(part, Here())
        with in_thread(lambda: choose(lead, ["int8"], [1000], 1, True, said.append)) as chosen:
            error = chosen.get(timeout=PATIENCE)
    assert isinstance(error, RankError)
    assert error.what.startswith("while links were tried, worker 0 has not answered the coordinator for ")
    assert said == ["links are tried: no answer for 0.2 s from worker 0"]
