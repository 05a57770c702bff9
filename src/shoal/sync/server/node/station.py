"""A state machine's mailbox: whatever comes over any of its connections, in one queue; whatever it sends, to whom."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server.messages import Address
from shoal.sync.server.node import frames
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.pool import Pool
from shoal.sync.server.wire import (
    BOTH_TLS,
    Connection,
    Credentials,
    FrameError,
    Limits,
    Listener,
    NotLetIn,
    Outbox,
    connect,
)
from shoal.sync.server.wire.connection import Frame
from shoal.sync.server.wire.listener import Refused

# Seconds between two looks at the book for somebody who cannot be reached; and for how long one tries.
_AGAIN, _PATIENCE = 0.2, 10.0
# Seconds in which a listener may let nobody in because it is just ending.
_SHUT = 3.0
# Seconds for one frame: this, and what its bytes take on a slow line.
_FRAME, _SLOWEST = 60.0, 50_000
# Seconds that a thread waits for a frame before it waits again, and for one that has begun.
_IDLE = 600.0
# Frames that may wait for somebody who reads slowly.
_MOST = 1024


class Said(NamedTuple):
    """A message has come, with its tensors."""

    sender: Address
    message: m.AnyMessage
    tensors: Sequence[Tensor]


class Lost(NamedTuple):
    """The connection with somebody ended, or could not be made. error: why nobody should try again."""

    address: Address
    error: JobError | None = None


Event = Said | Lost


class Station:
    """Whom `send` addresses and nobody is connected with, is called if its role is in `calls`; else it is dropped.

    Messages are lost where a connection breaks: the machines say them again. Their order between two sides is kept.
    """

    def __init__(self, me: Address, book: Book, credentials: Credentials, dtype: torch.dtype, calls: Sequence[str]):
        """dtype: of weights and gradients. calls: roles that this side connects with by itself."""
        self.me, self.book, self.credentials, self.dtype = me, book, credentials, dtype
        self.inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._calls = frozenset(calls)
        # For tensors of the frames that come, over all connections.
        self._pool = Pool()
        self._peers: dict[Address, _Peer] = {}
        self._lock = threading.Lock()
        self._listener: Listener | None = None
        self._closed = False
        # Somebody has let this side in: what a listener does not agree to has nothing to do with this side's options.
        self._let_in = False
        # Of connections that have ended.
        self._sent = self._received = 0

    def __enter__(self) -> Station:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def listen(self, host: str, refused: Refused | None = None, most: int = Limits.payload) -> None:
        """Lets others connect, and says in the book where. refused: told of who is not let in, as by `Listener`. most:
        bytes of tensors that who calls may send at a time: no memory is taken for more."""
        limits = Limits(payload=most)
        self._listener = Listener(self._serve, host=host, credentials=self.credentials, limits=limits, refused=refused)
        self.book.enter(self.me, *self._listener.address)

    def next(self, timeout: float) -> Event | None:
        """What has happened, or None after so many seconds (or after `wake`)."""
        try:
            return self.inbox.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return None

    def wake(self) -> None:
        """Lets whoever waits in `next` go on."""
        self.inbox.put(None)

    def send(self, to: Address, message: m.Message, tensors: Sequence[Tensor] = ()) -> None:
        """Returns at once. The tensors must stay as they are until the other side has answered."""
        with self._lock:
            peer = self._peers.get(to)
            if peer is None:
                if to.role not in self._calls or self._closed:
                    return
                peer = self._peers[to] = _Peer()
                threading.Thread(target=self._call, args=(to, peer), name=f"calls {to}", daemon=True).start()
        peer.put(m.encode(message), frames.buffers(tensors))

    def give_back(self, tensors: Sequence[Tensor]) -> None:
        """Of a message that has come: nobody reads them any more, nor views of them. Others will be received there."""
        self._pool.give(tensors)

    def connected(self, address: Address) -> bool:
        """Whether there is a connection with somebody, as far as is known."""
        with self._lock:
            peer = self._peers.get(address)
            return peer is not None and peer.connection is not None

    def drop(self, address: Address) -> None:
        """Ends the connection with somebody."""
        with self._lock:
            peer = self._peers.pop(address, None)
        if peer is not None:
            peer.close()

    def rename(self, me: Address) -> None:
        """From now on this side calls itself so: all connections begin anew."""
        self.me = me
        for address in list(self._peers):
            self.drop(address)

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        with self._lock:
            live = [peer.connection for peer in self._peers.values() if peer.connection is not None]
            sent = self._sent + sum(connection.bytes_sent for connection in live)
            return sent, self._received + sum(connection.bytes_received for connection in live)

    def close(self, flush: float = 1.0) -> None:
        """Ends all connections, after what waits to be sent has been, for at most `flush` seconds."""
        self._closed = True
        deadline = time.monotonic() + flush
        with self._lock:
            peers = list(self._peers.values())
        while any(peer.busy for peer in peers) and time.monotonic() < deadline:
            time.sleep(0.01)
        for address in list(self._peers):
            self.drop(address)
        if self._listener is not None:
            self._listener.close()

    def _serve(self, connection: Connection) -> None:
        """The thread of somebody who has called."""
        peer = _Peer()
        address = frames.address(connection.name)
        with self._lock:
            before, self._peers[address] = self._peers.get(address), peer
        if before is not None:
            before.close()
        self._talk(address, peer, connection)

    def _call(self, to: Address, peer: _Peer) -> None:
        """The thread of somebody whom this side calls."""
        error: JobError | None = None
        connection = None
        deadline, shut = time.monotonic() + _PATIENCE, math.inf
        while connection is None and not peer.closed and time.monotonic() < deadline:
            try:
                entry = self.book.find(to)
                if entry is not None:
                    connection = connect(
                        entry.host, entry.port, credentials=self.credentials, name=frames.name(self.me),
                        peer=f"{to.role} {to.number}", timeout=1.0,
                    )  # fmt: skip
            except JobError as found:
                error = found
                break
            except NotLetIn as found:
                shut = min(shut, time.monotonic())
                if time.monotonic() - shut > _SHUT and not self._let_in:
                    what = f"the {to.role} does not let this side in: {found}"
                    error = JobError(what, where=str(self.book.folder.parent), fix=BOTH_TLS)
                    break
            except OSError:
                shut = math.inf
            if connection is None:
                time.sleep(_AGAIN)
        if connection is None:
            self._forget(to, peer, error)
        else:
            self._let_in = True
            with connection:
                self._talk(to, peer, connection)

    def _talk(self, address: Address, peer: _Peer, connection: Connection) -> None:
        """Passes on what comes until the connection ends."""
        try:
            peer.open(connection)
            while True:
                try:
                    frame, message = self._receive(connection)
                except TimeoutError:
                    if connection.ended:
                        raise
                    continue
                self.inbox.put(Said(address, message, [b for b in frame.buffers if isinstance(b, Tensor)]))
        except OSError:
            # Its end is all that matters to the machine; why, the listener counts.
            pass
        finally:
            self._forget(address, peer)

    def _receive(self, connection: Connection) -> tuple[Frame, m.AnyMessage]:
        found: list[m.AnyMessage] = []

        def into(header: bytes, lengths: list[int]) -> list[Tensor]:
            found.append(frames.read(header))
            try:
                return frames.places(found[0], lengths, self.dtype, self._pool)
            except RuntimeError as error:  # torch's allocator
                raise FrameError("no memory", f"sent {sum(lengths):,} bytes: {error}") from None

        return connection.receive(into, timeout=_IDLE, slowest=_SLOWEST), found[0]

    def _forget(self, address: Address, peer: _Peer, error: JobError | None = None) -> None:
        with self._lock:
            mine = self._peers.get(address) is peer
            if mine:
                del self._peers[address]
            if peer.connection is not None:
                self._sent += peer.connection.bytes_sent
                self._received += peer.connection.bytes_received
        peer.close()
        if mine and not self._closed:
            self.inbox.put(Lost(address, error))


class _Peer:
    """What is to be sent to one other side: kept until it is connected, then handed to its outbox."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.closed = False
        self._outbox: Outbox | None = None
        self._waiting: list[tuple[bytes, list[Tensor]]] = []
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        return not self.closed and self._outbox is not None and self._outbox.waiting > 0

    def put(self, header: bytes, tensors: list[Tensor]) -> None:
        with self._lock:
            if self._outbox is None:
                # What is said again while nobody was reached goes once.
                if all(header != other for other, _ in self._waiting):
                    self._waiting.append((header, tensors))
                return
            if tensors and self._outbox.has(header):
                # Tensors that take longer than the other side's patience are not sent again behind themselves.
                return
            # Whoever receives from it learns of its end.
            with contextlib.suppress(ConnectionError):
                self._outbox.put(header, tensors)

    def open(self, connection: Connection) -> None:
        with self._lock:
            if self.closed:
                raise ConnectionError("closed here")
            self.connection = connection
            self._outbox = Outbox(connection, most=_MOST, timeout=_FRAME, slowest=_SLOWEST)
            for header, tensors in self._waiting:
                self._outbox.put(header, tensors)
            self._waiting.clear()

    def close(self) -> None:
        self.closed = True
        if self.connection is not None:
            self.connection.close()
        if self._outbox is not None:
            self._outbox.close()


__all__ = ["Event", "FrameError", "Lost", "Said", "Station"]
