"""Frames arrive whole, in order and in the memory that was meant for them; calls end when they have to."""

from __future__ import annotations

import socket
import threading
import time
import tracemalloc

import pytest
import torch

from shoal.sync.server.wire import FrameError, Limits, Listener, connect
from shoal.sync.server.wire.frame import pack
from tests.sync.server.peers import TRUSTED, echo, ended, eventually, in_thread, pair, serving

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def two():
    with pair() as ends:
        yield ends


def test_tensors_arrive_in_the_memory_that_is_given_for_them(two):
    worker, server = two
    sent = [torch.arange(35).reshape(5, 7).to(dtype) for dtype in DTYPES] + [torch.tensor(2.5), torch.empty(0, 3)]
    places = [torch.zeros_like(tensor) for tensor in sent]
    asked = []

    def into(header, lengths):
        asked.append((header, lengths))
        return places

    worker.send(b"gradients", sent, timeout=20)
    frame = server.receive(into, timeout=20)
    assert frame.header == b"gradients"
    assert asked == [(b"gradients", [tensor.nbytes for tensor in sent])]
    assert all(a is b for a, b in zip(frame.buffers, places, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sent, places, strict=True))
    # Both counters saw all of it.
    assert worker.bytes_sent == server.bytes_received > sum(tensor.nbytes for tensor in sent)


def test_the_receiver_copies_nothing(two):
    """Memory for 32 MiB is neither taken by the one side nor by the other."""
    worker, server = two
    sent, place = torch.ones(8 << 20), torch.zeros(8 << 20)
    tracemalloc.start()
    with in_thread(lambda: worker.send(b"", [sent], timeout=60)) as done:
        server.receive(lambda *_: [place], timeout=60)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done.get() is None
    assert torch.equal(sent, place)
    assert peak < 1 << 20


def test_more_buffers_than_the_kernel_takes_at_once(two):
    worker, server = two
    sent = [bytes([i % 256]) * (i % 5) for i in range(3000)]
    with in_thread(lambda: worker.send(b"many", sent, timeout=60)):
        assert server.receive(timeout=60).buffers == sent
    worker.send(b"none", timeout=20)
    assert server.receive(timeout=20) == (b"none", [])


def test_payload_that_nobody_wants_is_passed_over(two):
    worker, server = two
    with in_thread(lambda: worker.send(b"late", [bytes(5 << 20), b"x"], timeout=60)):
        assert server.receive(lambda *_: None, timeout=60) == (b"late", [])
    worker.send(b"next", timeout=20)
    assert server.receive(timeout=20).header == b"next"


def test_both_directions_at_once(two):
    """More than the kernel's buffers hold goes both ways before either is read: nobody waits for the other."""
    worker, server = two
    there, back = torch.randn(4 << 20), torch.randn(4 << 20)
    with in_thread(lambda: worker.send(b"push", [there], timeout=60)), in_thread(
        lambda: server.send(b"pull", [back], timeout=60)
    ):  # fmt: skip
        arrived, returned = torch.empty_like(there), torch.empty_like(back)
        with in_thread(lambda: server.receive(lambda *_: [arrived], timeout=60)):
            worker.receive(lambda *_: [returned], timeout=60)
    assert torch.equal(arrived, there)
    assert torch.equal(returned, back)


def test_a_wait_for_a_frame_ends_in_time_and_may_be_repeated(two):
    worker, server = two
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"worker 1 \(127\.0\.0\.1:\d+\)"):
        server.receive(timeout=0.2)
    assert 0.2 <= time.monotonic() - start < 10
    worker.send(b"late", timeout=20)
    assert server.receive(timeout=20).header == b"late"


def test_half_a_frame_ends_the_connection_in_time(two):
    worker, server = two
    worker._stream.write([memoryview(b"shlf\1")], time.monotonic() + 20)
    with pytest.raises(TimeoutError):
        server.receive(timeout=0.2)
    assert server.ended == "cut off"
    with pytest.raises(ConnectionError, match="closed on this side"):
        server.receive(timeout=20)
    with pytest.raises(ConnectionError):
        worker.receive(timeout=20)


@pytest.mark.nightly
def test_a_frame_that_begins_at_the_last_moment_has_its_own_time(two):
    worker, server = two
    head = pack(worker._session.send_key, 0, b"late", [4])

    def send() -> None:
        time.sleep(3.0)
        worker._stream.write([memoryview(head)], time.monotonic() + 20)
        time.sleep(3.0)
        worker._stream.write([memoryview(b"four")], time.monotonic() + 20)

    with in_thread(send):
        assert server.receive(timeout=5.0) == (b"late", [b"four"])


def test_a_peer_that_takes_nothing_does_not_hold_up_who_sends_for_longer_than_said(two):
    worker, _ = two
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        worker.send(b"", [bytes(64 << 20)], timeout=0.5)
    assert 0.5 <= time.monotonic() - start < 10
    assert worker.ended == "late"


@pytest.mark.parametrize("call", ["send", "receive"])
def test_close_ends_what_another_thread_waits_for(two, call: str):
    worker, _ = two
    waits = {
        "send": lambda: worker.send(b"", [bytes(64 << 20)], timeout=60),
        "receive": lambda: worker.receive(timeout=60),
    }
    with in_thread(waits[call]) as done:
        time.sleep(0.2)
        start = time.monotonic()
        worker.close()
    assert isinstance(done.get(), ConnectionError)
    assert time.monotonic() - start < 10
    assert worker._stream._socket.fileno() == -1
    worker.close()


def test_the_peer_s_end_is_told_at_once(two):
    worker, server = two
    with in_thread(lambda: server.receive(timeout=60)) as done:
        worker.close()
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert "worker 1" in str(done.get())
    assert server.ended == "closed"


def test_buffers_of_other_lengths_than_the_place_for_them(two):
    worker, server = two
    worker.send(b"", [b"four"], timeout=20)
    with pytest.raises(FrameError, match=r"worker 1 .*other lengths"):
        server.receive(lambda *_: [bytearray(5)], timeout=20)
    assert server.ended == "does not fit"


def test_what_the_caller_s_place_raises_goes_through(two):
    worker, server = two

    def into(header, lengths):
        raise KeyError("no such parameter")

    worker.send(b"", [b"four"], timeout=20)
    with pytest.raises(KeyError):
        server.receive(into, timeout=20)
    with pytest.raises(ConnectionError):
        worker.receive(timeout=20)


@pytest.mark.parametrize(
    ("header", "buffers"), [(65, []), (64, [b"1", b"2", b"3"]), (64, [bytes(600), bytes(425)])], ids=str
)
def test_limits_hold_before_anything_is_allocated(header: int, buffers: list[bytes]):
    limits, asked = Limits(header=64, buffers=2, payload=1024), []
    with pair(limits=limits) as (worker, server):
        # The worker's own limits are the usual ones.
        worker.send(bytes(64), [bytes(1000), bytes(24)], timeout=20)
        assert len(server.receive(timeout=20).header) == 64
        # Of a payload it says what this side takes, not what it sends.
        server.send(b"", [bytes(1025)], timeout=20)
        assert len(worker.receive(timeout=20).buffers[0]) == 1025
        worker.send(bytes(header), buffers, timeout=20)
        with pytest.raises(FrameError, match="at most"):
            server.receive(lambda *it: asked.append(it), timeout=20)
        assert (server.ended, asked) == ("too large", [])
        if header > limits.header or len(buffers) > limits.buffers:
            with pytest.raises(AssertionError):
                server.send(bytes(header), buffers, timeout=20)


def test_many_workers_at_once_and_one_that_stalls_in_the_middle_of_a_frame():
    with Listener(echo, credentials=TRUSTED) as listener:
        workers = [connect(*listener.address, credentials=TRUSTED, timeout=20) for _ in range(12)]
        workers[0]._stream.write([memoryview(b"shlf\1\0\0\0")], time.monotonic() + 20)
        # And one that takes none of what it is sent.
        with in_thread(lambda: workers[1].send(b"", [bytes(8 << 20)], timeout=60)):
            for round_ in range(5):
                for i, worker in enumerate(workers[2:]):
                    worker.send(bytes([i, round_]), [bytes([i]) * 100_000], timeout=20)
                for i, worker in enumerate(workers[2:]):
                    header, (data,) = worker.receive(timeout=20)
                    assert (header, data) == (bytes([i, round_]), bytes([i]) * 100_000)
        for worker in workers:
            worker.close()
        assert eventually(lambda: sum(listener.ended.values()) == 12)
        assert listener.ended["cut off"] >= 1
    assert serving() == 0


def test_no_more_connections_than_agreed_on_and_their_places_come_back():
    with Listener(echo, credentials=TRUSTED, most=2) as listener:
        first, second = (connect(*listener.address, credentials=TRUSTED, timeout=20) for _ in range(2))
        with pytest.raises(Exception, match="as many connections as it takes"):
            connect(*listener.address, credentials=TRUSTED, timeout=20)
        first.close()
        assert eventually(lambda: sum(listener.ended.values()) == 2)
        with connect(*listener.address, credentials=TRUSTED, timeout=20) as third, second:
            third.send(b"in", timeout=20)
            assert third.receive(timeout=20).header == b"in"
        assert eventually(lambda: listener.ended["full"] == 1)


@pytest.mark.parametrize("refused", ["socket", "thread"])
def test_the_listener_goes_on_when_the_system_has_no_more_to_give(refused: str, monkeypatch: pytest.MonkeyPatch):
    def no_socket(*_: object, **__: object) -> None:
        raise OSError("Too many open files")

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Listener(echo) as listener:
        with monkeypatch.context() as patch:
            if refused == "socket":
                patch.setattr("shoal.sync.server.wire.listener.configure", no_socket)
            else:
                patch.setattr(threading.Thread, "start", no_thread)
            with socket.create_connection(listener.address) as sock:
                sock.settimeout(20)
                assert ended(sock)
            assert eventually(lambda: listener.ended["not accepted"] == 1)
        with connect(*listener.address, timeout=20) as worker:
            worker.send(b"in", timeout=20)
            assert worker.receive(timeout=20).header == b"in"


def test_who_connects_waits_for_a_listener_that_is_still_starting():
    # Taken, so that no other program listens there meanwhile.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"server 0 \(127\.0\.0\.1:{port}\) cannot be reached"):
            connect("127.0.0.1", port, peer="server 0", timeout=0.2)
    with in_thread(lambda: connect("127.0.0.1", port, timeout=30).close()) as done:
        time.sleep(0.3)
        with Listener(echo, port=port):
            assert done.get(timeout=30) is None


def test_a_silent_machine_is_found_out_and_nothing_small_waits():
    with pair() as ends:
        for sock in (end._stream._socket for end in ends):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_a_gpu_go_through_host_memory(two):
    worker, server = two
    sent, place = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
    worker.send(b"", [sent], timeout=20)
    server.receive(lambda *_: [place], timeout=20)
    assert torch.equal(sent, place)
