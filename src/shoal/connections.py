"""The TCP connections between ranks, watched and broken off from outside of the library that uses them.

Gloo cannot abort, and where a peer dies in the middle of a message, the operation that was receiving it waits for its
whole timeout. The kernel knows better: it says at once that a connection has ended, and it ends one when told to.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket

# The peer has closed, or the connection is broken.
_ENDED = select.POLLERR | select.POLLHUP | getattr(select, "POLLRDHUP", 0)


class Connections:
    """The connections that were opened in a `with` block, by whatever library: their descriptors are duplicated."""

    def __enter__(self) -> Connections:
        self._before = _descriptors()
        self._sockets: list[socket.socket] = []
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets = [sock for fd in _descriptors() - self._before if (sock := _connection(fd)) is not None]

    def __len__(self) -> int:
        return len(self._sockets)

    def broken(self) -> bool:
        """Whether any peer has closed its connection, or was killed."""
        poll = select.poll()
        for sock in self._sockets:
            poll.register(sock, _ENDED)
        return any(event & _ENDED for _, event in poll.poll(0))

    def sever(self) -> None:
        """Ends all connections, for both sides, though the library still holds them open; then forgets them."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        """Forgets the connections, so that they end when the library closes them."""
        for sock in self._sockets:
            sock.close()
        self._sockets = []


def _descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/dev/fd")}


def _connection(fd: int) -> socket.socket | None:
    """A duplicate of a connected TCP socket; None for anything else."""
    with contextlib.suppress(OSError):
        copy = os.dup(fd)
        try:
            sock = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
            return None
        with contextlib.suppress(OSError):
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getpeername():
                return sock
        sock.close()
    return None
