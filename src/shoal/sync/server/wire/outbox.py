"""Answers to a peer that somebody else's thread gives, who must not wait for that peer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from shoal.sync.server.wire.buffers import Buffer, size
from shoal.sync.server.wire.connection import Connection


class Outbox:
    """Frames on their way to one peer, in order, sent by a thread of its own until `close`.

    most: frames that may wait; a peer that reads too slowly for that loses its connection. timeout: seconds for each,
    and one more for so many of its bytes (`slowest`).
    """

    def __init__(self, connection: Connection, *, most: int = 64, timeout: float = 60.0, slowest: float = 1e6):
        self._connection, self._most, self._timeout, self._slowest = connection, most, timeout, slowest
        self._waiting: deque[tuple[bytes, Sequence[Buffer]]] = deque()
        self._sending: bytes | None = None
        # Frames that the kernel has taken, and the count of sent bytes that they end with.
        self._leaving: deque[tuple[bytes, int]] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._send, name=f"answers {connection.peer}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Frames that have not been sent, or not wholly."""
        return len(self._waiting) + (self._sending is not None)

    def has(self, header: bytes) -> bool:
        """Whether a frame with this header waits, or is on its way to the other side's kernel.

        On a slow line the last seconds of that way are in this side's kernel.
        """
        with self._changed:
            self._arrive()
            waiting = (other for other, _ in (*self._waiting, *self._leaving))
            return header == self._sending or header in waiting

    def put(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Returns at once; the buffers must stay as they are until they are sent.

        ConnectionError where the connection has ended, or ends now because too many wait."""
        with self._changed:
            if len(self._waiting) >= self._most:
                self._connection.close()
            if self._connection.ended:
                raise ConnectionError(f"lost the connection with {self._connection.peer}, which takes no more answers")
            self._waiting.append((header, buffers))
            self._changed.notify()

    def close(self) -> None:
        """Sends what waits, unless the connection has ended, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _send(self) -> None:
        while (frame := self._next()) is not None:
            header, buffers = frame
            seconds = self._timeout + sum(map(size, buffers)) / self._slowest
            try:
                self._connection.send(header, buffers, timeout=seconds)
            except OSError:
                # Told to whoever receives from this peer, and to whoever puts the next one in.
                return self._connection.close()
            except BaseException:
                # A fault of this side's; nobody must wait for what will never be sent.
                self._connection.close()
                raise
            with self._changed:
                self._arrive()
                self._leaving.append((header, self._connection.bytes_sent))

    def _arrive(self) -> None:
        """Forgets what is no longer on its way."""
        while self._leaving and self._leaving[0][1] <= self._connection.bytes_arrived:
            self._leaving.popleft()

    def _next(self) -> tuple[bytes, Sequence[Buffer]] | None:
        with self._changed:
            self._sending = None
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            self._sending = self._waiting[0][0]
            return self._waiting.popleft()
