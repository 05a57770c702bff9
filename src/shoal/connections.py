"""The TCP connections between ranks, watched and broken off from outside of the library that uses them.

Gloo cannot abort, and where a peer dies in the middle of a message, the operation that was receiving it waits for its
whole timeout. The kernel knows better: it says at once that a connection has ended, and it ends one when told to.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
from collections.abc import Collection

SILENCE = 20
"""Seconds without an answer from another host after which the kernel ends its connections."""

# The peer has closed, or the connection is broken.
_ENDED = select.POLLERR | select.POLLHUP | getattr(select, "POLLRDHUP", 0)


class PeerGone(ConnectionError):
    """A rank has closed its connections, or its host does not answer. lost: `10.77.0.3 (rank 2)`; empty = not known."""

    def __init__(self, lost: str):
        super().__init__(f"connection closed by peer: {lost or 'a rank is gone in the middle of a collective'}")
        self.lost = lost


class Connections:
    """The connections that were opened in a `with` block, by whatever library: their descriptors are duplicated.

    A process that dies has its kernel say so. A host that loses power, or its cable, says nothing, and who waits for
    its data waits for ever; so those to other hosts are asked after (Linux) and end when there was no answer for
    `SILENCE` seconds. A host that is only busy answers: its kernel does.
    """

    def __enter__(self) -> Connections:
        self._before = _descriptors()
        self._sockets: list[socket.socket] = []
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets = [sock for fd in _descriptors() - self._before if (sock := _connection(fd)) is not None]
        # Once they have ended, they do not tell any more.
        self._peers = {sock.fileno(): sock.getpeername()[0] for sock in self._sockets}
        for sock in self._sockets:
            if not ipaddress.ip_address(self._peers[sock.fileno()]).is_loopback:
                _ask_after(sock)

    def __len__(self) -> int:
        return len(self._sockets)

    def opened(self) -> set[int]:
        """Within the block: what has been opened in it, by the numbers that the system gives."""
        return _inodes(_descriptors() - self._before)

    def among(self, opened: Collection[int]) -> list[int]:
        """After the block: the descriptors of those connections that were opened then."""
        return [sock.fileno() for sock in self._sockets if _inodes({sock.fileno()}) & set(opened)]

    def address(self) -> str:
        """This host's, as its peers on others know it; empty where there are none."""
        own = (sock.getsockname()[0] for sock in self._sockets)
        return next((address for address in own if not ipaddress.ip_address(address).is_loopback), "")

    def broken(self) -> bool:
        """Whether any peer has closed its connection, or was killed, or is silent."""
        return bool(self.ended())

    def ended(self) -> set[str]:
        """The addresses of these peers."""
        poll = select.poll()
        for sock in self._sockets:
            poll.register(sock, _ENDED)
        return {self._peers[fd] for fd, event in poll.poll(0) if event & _ENDED}

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


def _ask_after(sock: socket.socket) -> None:
    """Idle, the peer is asked every few seconds; what was sent to it must be acknowledged in time."""
    times = {"TCP_KEEPIDLE": SILENCE // 4, "TCP_KEEPINTVL": SILENCE // 4, "TCP_KEEPCNT": 3}
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in {**times, "TCP_USER_TIMEOUT": 1000 * SILENCE}.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/dev/fd")}


def _inodes(descriptors: set[int]) -> set[int]:
    inodes = set()
    for fd in descriptors:
        with contextlib.suppress(OSError):  # closed since
            inodes.add(os.fstat(fd).st_ino)
    return inodes


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
