"""Messages over a Unix socket: msgpack, length first; open files may travel along."""

from __future__ import annotations

import array
import contextlib
import socket
import threading
from collections import deque
from typing import Any

import msgspec

_PREFIX = 8
_CHUNK = 1 << 20
_FILES = socket.CMSG_SPACE(64 * array.array("i").itemsize)
# Programs that the receiver executes do not get the files.
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Channel:
    """One end of a connection. `kind` is the type (or union of tagged types) that the other end sends."""

    def __init__(self, sock: socket.socket, kind: Any):
        self.socket = sock
        self.files: deque[int] = deque()
        self._sending = threading.Lock()
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()
        self._ready: deque[Any] = deque()

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: msgspec.Struct, file: int | None = None) -> None:
        """Blocks until the message is with the kernel; from any thread. OSError if the other end is gone."""
        body = msgspec.msgpack.encode(message)
        frame = len(body).to_bytes(_PREFIX, "little") + body
        with self._sending:
            if file is not None:
                sent = socket.send_fds(self.socket, [frame], [file])
                frame = frame[sent:]
            self.socket.sendall(frame)

    def read(self, flags: int = 0) -> list[Any]:
        """Messages that are complete after one read; blocks only if nothing has come. EOFError at the end."""
        try:
            # Not socket.recv_fds, which forgets the flags (CPython 3.11).
            data, extras, _, _ = self.socket.recvmsg(_CHUNK, _FILES, flags | _CLOEXEC)
        except ConnectionResetError:
            data, extras = b"", []
        for _, _, files in extras:
            self.files.extend(array.array("i", files))
        if not data:
            raise EOFError
        self._buffer += data
        messages = []
        while len(self._buffer) >= _PREFIX:
            end = _PREFIX + int.from_bytes(self._buffer[:_PREFIX], "little")
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[_PREFIX:end]))
            del self._buffer[:end]
        return messages

    def wait(self) -> Any:
        """The next message. EOFError when the other end has closed."""
        while not self._ready:
            self._ready.extend(self.read())
        return self._ready.popleft()

    def drain(self) -> list[Any]:
        """All complete messages that have come, without waiting, also when the other end is gone."""
        messages = []
        with contextlib.suppress(EOFError, BlockingIOError):
            while True:
                messages += self.read(socket.MSG_DONTWAIT)
        return messages

    def close(self) -> None:
        self.socket.close()
