"""One authenticated connection: frames out, frames in."""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from shoal.sync.server.wire.buffers import Buffer, to_fill, to_send
from shoal.sync.server.wire.frame import PREFIX, FrameError, Limits, pack, read_prefix, read_rest
from shoal.sync.server.wire.handshake import Session
from shoal.sync.server.wire.stream import Stream

# Bytes of payload that nobody wants, read at a time.
_SCRATCH = 1 << 20

Into = Callable[[bytes, list[int]], Sequence[Buffer] | None]


class Frame(NamedTuple):
    """What has come: the header, and the buffers that were filled (none where they were not wanted)."""

    header: bytes
    buffers: list[Buffer]


class Connection:
    """Frames to and from one peer. One thread may receive while others send, and any may `close`.

    Whoever wants to know of a peer's end at once, lets a thread be in `receive`.
    Errors: ConnectionError when the peer is gone or `close` was called, FrameError (one of these) for a frame that must
    not be believed, TimeoutError. All name the peer. After any, but a TimeoutError before the first byte has come or
    while another thread was at it, the connection has ended, and buffers that were being filled hold anything.
    """

    def __init__(self, stream: Stream, session: Session, limits: Limits):
        self.peer = stream.peer
        # How the one who connected calls itself.
        self.name = session.name
        # Why it ended, in a word or two to count by; empty while it has not.
        self.ended = ""
        self._stream, self._session, self._limits = stream, session, limits
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._sent = self._received = 0
        self._closed = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bytes_sent(self) -> int:
        """With headers and codes; TCP's and TLS's own bytes come on top."""
        return self._stream.sent

    @property
    def bytes_received(self) -> int:
        """With headers and codes; TCP's and TLS's own bytes come on top."""
        return self._stream.received

    @property
    def bytes_arrived(self) -> int:
        """Of those sent, how many the other side's kernel has: with TLS a few less, as encrypted ones are more."""
        return self._stream.sent - self._stream.unacknowledged

    def send(self, header: bytes, buffers: Sequence[Buffer] = (), *, timeout: float) -> None:
        """Returns when the kernel has taken all of it; buffers may be changed then.

        buffers: contiguous memory; of tensors on the CPU nothing is copied here. timeout: seconds for all of it.
        """
        deadline = time.monotonic() + timeout
        views = [to_send(buffer) for buffer in buffers]
        lengths, limits = [len(view) for view in views], self._limits
        # How many bytes the other side takes is for that one to say.
        fits = len(header) <= limits.header and len(views) <= limits.buffers
        assert fits, f"a frame with a header of {len(header)} bytes and {len(views)} buffers is beyond {limits}"
        checksums = [zlib.crc32(view) for view in views] if self._session.checked else None
        with self._turn(self._sending, deadline), self._ending_on_error():
            head = pack(self._session.send_key, self._sent, header, lengths, checksums)
            self._sent += 1
            self._stream.write([memoryview(head), *views], deadline)

    def receive(self, into: Into | None = None, *, timeout: float, slowest: float = math.inf) -> Frame:
        """The next frame. timeout: seconds until it begins; and then for the rest of it, with one more for so many
        bytes (`slowest`).

        into: gives the memory for the buffers of a frame with this header and these lengths in bytes, which then are
        filled without a copy: tensors on the CPU or other memory, of just these lengths; None: they are thrown away.
        Called only for a header that is authentic and within the limits; what it raises ends the connection. Without
        `into`, buffers are new bytearrays.
        """
        deadline = time.monotonic() + timeout
        with self._turn(self._receiving, deadline):
            before = self._stream.received
            data = bytearray(PREFIX.size)
            try:
                self._stream.read([memoryview(data)], deadline)
            except OSError as error:
                begun = self._stream.received > before
                if begun or not isinstance(error, TimeoutError):
                    self._end("cut off" if begun else "closed")
                raise
            with self._ending_on_error():
                return self._rest(data, into or _new, time.monotonic() + timeout, slowest)

    def close(self) -> None:
        """Ends it for both sides; threads that are in `send` or `receive` get a ConnectionError. May be repeated."""
        self._end("closed here")
        self._closed = True
        self._give_back()

    def _rest(self, data: bytearray, into: Into, deadline: float, slowest: float) -> Frame:
        prefix = read_prefix(data, self._limits)
        rest = bytearray(prefix.rest)
        self._stream.read([memoryview(rest)], deadline)
        header, lengths, checksums = read_rest(
            self._session.receive_key, self._received, data, prefix, rest, self._limits
        )
        self._received += 1
        deadline += sum(lengths) / slowest
        if prefix.checked != self._session.checked:
            raise FrameError("no frame", "sent a frame with or without CRCs, unlike what was agreed on")
        buffers = into(header, lengths)
        if buffers is None:
            self._skip(sum(lengths), deadline)
            return Frame(header, [])
        places = [to_fill(buffer) for buffer in buffers]
        views = [view for view, _ in places]
        if [len(view) for view in views] != lengths:
            raise FrameError("does not fit", f"sent {len(lengths)} buffers of other lengths than there is place for")
        self._stream.read(views, deadline)
        if prefix.checked and [zlib.crc32(view) for view in views] != checksums:
            raise FrameError("damaged", "sent a payload whose CRC-32 is not that of its header")
        for _, complete in places:
            if complete is not None:
                complete()
        return Frame(header, list(buffers))

    def _skip(self, left: int, deadline: float) -> None:
        scratch = memoryview(bytearray(min(left, _SCRATCH)))
        while left:
            part = scratch[:left]
            self._stream.read([part], deadline)
            left -= len(part)

    @contextmanager
    def _turn(self, lock: threading.Lock, deadline: float) -> Iterator[None]:
        if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"{self.peer}: another thread is still at it")
        try:
            yield
        finally:
            lock.release()
            if self._closed:
                self._give_back()

    def _give_back(self) -> None:
        """Closes the descriptor, if no thread is at it; otherwise the last one that leaves does."""
        if self._sending.acquire(blocking=False):
            if self._receiving.acquire(blocking=False):
                self._stream.close()
                self._receiving.release()
            self._sending.release()

    @contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        """For the middle of a frame: nothing that comes after can be understood."""
        try:
            yield
        except FrameError as error:
            self._end(error.reason)
            raise FrameError(error.reason, f"{self.peer} {error}") from None
        except BaseException as error:
            self._end("late" if isinstance(error, TimeoutError) else "cut off")
            raise

    def _end(self, why: str) -> None:
        self.ended = self.ended or why
        self._stream.sever()


def _new(header: bytes, lengths: list[int]) -> list[Buffer]:
    return [bytearray(length) for length in lengths]
