"""Both ends of connections, in one process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Queue
from typing import Any

from shoal.sync.server.wire import Connection, Credentials, Listener, connect
from shoal.sync.server.wire.handshake import Session, ask
from shoal.sync.server.wire.stream import Stream

TOKEN = "a token that only this job knows"
TRUSTED = Credentials(TOKEN)


@contextmanager
def pair(credentials: Credentials = TRUSTED, **options: Any) -> Iterator[tuple[Connection, Connection]]:
    """(the worker's end, the server's end)."""
    ends: Queue[Connection] = Queue()
    done = threading.Event()

    def handle(connection: Connection) -> None:
        ends.put(connection)
        done.wait(60)

    with (
        Listener(handle, credentials=credentials, **options) as listener,
        connect("127.0.0.1", listener.address[1], credentials=credentials, name="worker 1", timeout=20) as worker,
    ):
        try:
            yield worker, ends.get(timeout=20)
        finally:
            done.set()


def echo(connection: Connection) -> None:
    """Sends back what comes, until the peer ends."""
    while True:
        frame = connection.receive(timeout=60)
        connection.send(frame.header, frame.buffers, timeout=60)


@contextmanager
def in_thread(function: Callable[[], Any]) -> Iterator[Queue[Any]]:
    """Runs it meanwhile; the queue gets what it returns or raises."""
    result: Queue[Any] = Queue()

    def main() -> None:
        try:
            result.put(function())
        except Exception as error:
            result.put(error)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    yield result
    thread.join(60)
    assert not thread.is_alive()


def raw(listener: Listener, token: str = TOKEN) -> tuple[socket.socket, Session]:
    """A socket whose handshake is done, and its keys: for a peer that then sends what it likes."""
    return raw_at(listener.address, token, "worker 9")


def raw_at(address: tuple[str, int], token: str, name: str) -> tuple[socket.socket, Session]:
    """The same at an address. name: of this side."""
    sock = socket.create_connection(address)
    session = ask(Stream(sock, "the listener"), token, name, b"", time.monotonic() + 20)
    sock.settimeout(20)
    return sock, session


def ended(sock: socket.socket) -> bool:
    """Whether the other side ends the connection (within the socket's timeout), after whatever it sends before."""
    with suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
    return True


def serving() -> int:
    """Threads of listeners in this process."""
    return sum(thread.name.startswith(("accepts", "serves")) for thread in threading.enumerate())


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
