"""What the lead of a trial and its parts say to each other, where a part is lost or late: parts made by hand."""

from __future__ import annotations

import contextlib
import time

from shoal.sync.server.node import trial
from shoal.sync.server.node.trial import Here, Tried, Try, receive, send
from shoal.sync.server.node.trial_lead import Gone, Lead, Unreached
from shoal.sync.server.wire import Connection, connect
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
