"""Bytes over one socket, plain or TLS: gathered from and scattered to many buffers, every wait with a deadline.

The socket never blocks; waits are polls. So one thread may read while another writes, also under TLS (whose state
allows one call at a time, which a poll outside of the call does not hold up), and a third may end both.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import ssl
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

# Buffers that the kernel takes in one call.
_VECTOR = min(os.sysconf("SC_IOV_MAX"), 1024)
# Bytes; Linux takes it twice. Measured with 64 MiB: 4.2 GiB/s, and 2.3 GiB/s with what the kernel chooses.
_LOOPBACK_BUFFER = 1 << 18
# Seconds after which a connection ends whose other machine has gone silent. Not fewer: Linux also counts the time in
# which the peer is there but reads nothing, because it computes.
_SILENCE = 60


class Stream:
    """A connected socket; `peer` names the other side in errors. One reader and one writer at a time.

    After a ConnectionError, or a TimeoutError of `write`, what was on the way is lost: `sever` or `close` it.
    """

    def __init__(self, sock: socket.socket, peer: str):
        sock.setblocking(False)
        self.peer = peer
        # Bytes so far, as the caller sees them (of TLS: before encryption).
        self.sent = self.received = 0
        self._socket = sock
        # One call at a time where there is a state to share.
        self._turn = threading.Lock() if isinstance(sock, ssl.SSLSocket) else contextlib.nullcontext()
        self._severed = threading.Event()

    def secure(self, deadline: float) -> None:
        """The handshake of TLS, if this is TLS."""
        if isinstance(self._socket, ssl.SSLSocket):
            while not self._try(self._secure_some, deque(), select.POLLIN, deadline):
                pass

    def write(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """All bytes of the buffers, to the kernel. deadline: in seconds of `time.monotonic`."""
        left = _filled(buffers)
        while left:
            count = self._try(self._write_some, left, select.POLLOUT, deadline)
            self.sent += count
            _drop(left, count)

    def read(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """Fills the buffers. On TimeoutError, `received` says whether anything has come."""
        left = _filled(buffers)
        while left:
            count = self._try(self._read_some, left, select.POLLIN, deadline)
            self.received += count
            _drop(left, count)

    def sever(self) -> None:
        """Ends the connection for both sides, and for threads that wait for it here. From any thread."""
        self._severed.set()
        with contextlib.suppress(OSError):
            # Not SSLSocket's own, which would let a reader go on without decryption.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the descriptor back. Only when no other thread reads or writes: it would poll somebody else's."""
        self.sever()
        self._socket.close()

    @property
    def severed(self) -> bool:
        return self._severed.is_set()

    @property
    def unacknowledged(self) -> int:
        """Bytes that the kernel has taken and the other side's has not acknowledged (of TLS: encrypted ones)."""
        try:
            # Of a socket this is Linux's SIOCOUTQ (man 7 tcp).
            return int(struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))[0])
        except (OSError, ValueError):
            # It is closed, or this system does not say.
            return 0

    def _try(self, move: _Move, left: deque[memoryview], event: int, deadline: float) -> int:
        """Bytes that were moved; 0 after a wait for `event`."""
        try:
            with self._turn:
                count = move(left)
        except BlockingIOError:
            return self._wait(event, deadline)
        except ssl.SSLWantReadError:
            return self._wait(select.POLLIN, deadline)
        except ssl.SSLWantWriteError:
            return self._wait(select.POLLOUT, deadline)
        except OSError as error:
            raise self._lost(str(error)) from error
        if count == 0 or self.severed:
            raise self._lost("the other side has ended it")
        return count

    def _secure_some(self, left: deque[memoryview]) -> int:
        assert isinstance(self._socket, ssl.SSLSocket)
        self._socket.do_handshake()
        return 1

    def _write_some(self, left: deque[memoryview]) -> int:
        if isinstance(self._socket, ssl.SSLSocket):
            return self._socket.send(left[0])
        return self._socket.sendmsg(islice(left, _VECTOR))

    def _read_some(self, left: deque[memoryview]) -> int:
        if isinstance(self._socket, ssl.SSLSocket):
            return self._socket.recv_into(left[0])
        return self._socket.recvmsg_into(islice(left, _VECTOR))[0]

    def _wait(self, event: int, deadline: float) -> int:
        if self.severed:
            raise self._lost("")
        poll = select.poll()
        poll.register(self._socket, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError(f"{self.peer} has not answered in time")
        return 0

    def _lost(self, why: str) -> ConnectionError:
        why = "it was closed on this side" if self.severed else why
        return ConnectionError(f"lost the connection with {self.peer}: {why}")


_Move = Callable[[deque[memoryview]], int]


def _filled(buffers: Sequence[memoryview]) -> deque[memoryview]:
    """Those with anything in them: to read nothing looks like the end."""
    return deque(buffer for buffer in buffers if len(buffer))


def _drop(left: deque[memoryview], count: int) -> None:
    """Takes `count` bytes away from the front."""
    while count:
        first = left.popleft()
        if count < len(first):
            left.appendleft(first[count:])
            return
        count -= len(first)


def configure(sock: socket.socket, *, loopback: bool) -> None:
    """Options of a TCP socket, before it listens or connects (windows are agreed on then).

    Nothing small waits to be sent together with more, and a peer whose machine is gone is found out. On loopback,
    buffers are small enough for what is copied in to be copied out of the cache again; between machines the kernel
    sizes them by the delay of the way, which it no longer does once a size has been set.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if loopback:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOOPBACK_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LOOPBACK_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not every system has all of these.
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_USER_TIMEOUT", 1000 * _SILENCE)):
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
