"""Answers that are put into an outbox arrive in order, and a slow peer holds up nobody but itself."""

from __future__ import annotations

import threading
import time

import pytest

from shoal.sync.server.wire import Limits, Outbox
from tests.sync.server.peers import in_thread, pair


@pytest.fixture
def two():
    with pair() as ends:
        yield ends


def test_answers_of_several_threads_arrive_each_in_its_order(two):
    worker, server = two
    with Outbox(server, most=1000) as outbox:

        def answer(who: int) -> None:
            for number in range(100):
                outbox.put(bytes([who, number]))

        threads = [threading.Thread(target=answer, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        answers = [worker.receive(timeout=20).header for _ in range(400)]
        for thread in threads:
            thread.join()
    for who in range(4):
        assert [number for name, number in answers if name == who] == list(range(100))


def test_what_waits_is_sent_before_the_end(two):
    worker, server = two
    with Outbox(server, most=1000) as outbox:
        for number in range(200):
            outbox.put(b"%d" % number)
    assert not outbox._thread.is_alive()
    assert [worker.receive(timeout=20).header for _ in range(200)] == [b"%d" % number for number in range(200)]


def until(true, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_other_side_has_not_got_is_on_its_way_though_the_kernel_has_it(two):
    worker, server = two
    headers = [b"%d" % number for number in range(64)]
    with Outbox(server) as outbox:
        # Until the other side's buffer is full, and a frame lies in this side's.
        for put, header in enumerate(headers, 1):  # noqa: B007
            outbox.put(header, [bytes(1 << 15)])
            until(lambda: not outbox.waiting)
            if server.bytes_arrived < server.bytes_sent:
                break
        assert outbox.has(header), "it would be sent a second time"
        assert not outbox.has(headers[0]), "nobody could ask for it again"
        for _ in range(put):
            worker.receive(timeout=20)
        until(lambda: not outbox.has(header))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_can_never_be_sent_ends_the_connection():
    """A limit of this side's own: a fault of the program, which must not leave the other side waiting."""
    with pair(limits=Limits(header=64)) as (worker, server), Outbox(server) as outbox:
        outbox.put(bytes(65))
        with pytest.raises(ConnectionError):
            worker.receive(timeout=20)
        with pytest.raises(ConnectionError):
            outbox.put(b"next")


def put_on(outbox: Outbox, header: bytes, pause: float = 0.0) -> None:
    """Until it fails, or for 20 seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        outbox.put(header)
        time.sleep(pause)


def test_a_peer_that_takes_no_answers_loses_its_connection_and_holds_nobody_up(two):
    worker, server = two
    with Outbox(server, most=8) as outbox:
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"worker 1 .*takes no more answers"):
            put_on(outbox, bytes(1 << 20))
        assert time.monotonic() - start < 10
    assert not outbox._thread.is_alive()
    with in_thread(lambda: [worker.receive(timeout=20) for _ in range(100)]) as received:
        assert isinstance(received.get(timeout=30), ConnectionError)


def test_a_peer_that_is_gone(two):
    worker, server = two
    with Outbox(server) as outbox:
        worker.close()
        with pytest.raises(ConnectionError, match="worker 1"):
            put_on(outbox, b"answer", 0.001)
    assert not outbox._thread.is_alive()
