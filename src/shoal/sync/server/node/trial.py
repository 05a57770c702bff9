"""Before a run whose parts are on several machines: workers and shards exchange numbers, as `trial_lead` orders it.

    part ─ Here ─► lead       all parts are there      lead ─ Try ─► workers ─ Pushed ─► shards       all at a time
                                                       lead ◄─ Tried ─ workers ◄─ Pulled ─ shards

Connections are those of training (`wire`: token, TLS, CRC), and so are the links.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch
from torch import Tensor

from shoal.sync.codec import codec_of
from shoal.sync.server.messages import Piece
from shoal.sync.server.payload import from_bytes, to_bytes
from shoal.sync.server.wire import Connection, Credentials, Frame, FrameError, Listener, connect
from shoal.sync.server.wire.connection import Into

PATIENCE = 60.0
"""Seconds for one frame that has begun."""
# To connect with a shard, which listens before it says where: one that refuses is gone, or is not let through.
_REACHED = 5.0


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Any of those below."""


class Here(Message, frozen=True):
    """A part is there. host, port: where a shard listens."""

    host: str = ""
    port: int = 0


class Try(Message, frozen=True):
    """To each worker: exchange so many numbers with each shard. shards: where they listen. turn: counts trials.

    times: as often as what is encoded comes back, where that is fewer bytes than the numbers are. feedback: what a
    codec loses is computed, too.
    """

    turn: int
    codec: str
    numbers: tuple[int, ...]
    shards: tuple[tuple[str, int], ...]
    times: int = 1
    feedback: bool = True


class Tried(Message, frozen=True):
    """seconds: that it took; less than 0 where a shard was lost. unreached: which worker cannot connect with which
    shard, and why; empty where it can. silent: which shard is connected and has not answered whom."""

    turn: int
    seconds: float
    unreached: str = ""
    silent: str = ""


class Over(Message, frozen=True):
    """There is nothing more to try."""


class Pushed(Message, frozen=True):
    """From a worker to a shard, with the numbers, or their bytes in this codec."""

    codec: str
    numbers: int
    times: int


class Pulled(Message, frozen=True):
    """The answer. encoded: its buffers are bytes of the codec, each of all numbers."""

    encoded: bool


_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Here | Try | Tried | Over | Pushed | Pulled)


class Links:
    """A worker's connections with all shards."""

    def __init__(self, name: str, credentials: Credentials, dtype: torch.dtype):
        """name: of the worker. dtype: of weights and gradients."""
        self.name, self.credentials, self.dtype = name, credentials, dtype
        self._connections: dict[tuple[str, int], Connection] = {}

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def tried(self, order: Try) -> Tried:
        """How long it took from the first number encoded to the last one decoded."""
        if unreached := self._connect(order.shards):
            return Tried(order.turn, -1.0, unreached)
        try:
            values = [torch.ones(numbers, dtype=self.dtype) for numbers in order.numbers]
            began = time.perf_counter()
            self._exchange(order, values)
            return Tried(order.turn, time.perf_counter() - began)
        except TimeoutError as error:
            # No error of this worker's, which may be on a machine that nobody watches: the lead tells it.
            self._drop()
            return Tried(order.turn, -1.0, silent=f"{error} has not answered {self.name} for {PATIENCE:g} s")
        except ConnectionError:
            self._drop()
            return Tried(order.turn, -1.0)

    def _connect(self, shards: Sequence[tuple[str, int]]) -> str:
        """Which shard cannot be reached, and why; empty where all are."""
        if [*self._connections] == [*shards]:
            return ""
        self._drop()
        for number, (host, port) in enumerate(shards):
            try:
                self._connections[host, port] = connect(
                    host, port, credentials=self.credentials, name=self.name, peer=f"server {number}",
                    timeout=_REACHED,
                )  # fmt: skip
            except OSError as error:
                # No error of this worker's: the shard may listen elsewhere by now, which the lead knows.
                self._drop()
                return f"{self.name} cannot connect with server {number}: {error}"
        return ""

    def _exchange(self, order: Try, values: Sequence[Tensor]) -> None:
        """All shards at a time, as in a push and a pull. TimeoutError, whose message is the shard."""
        sent = [_written(order.codec, value, order.feedback) for value in values]

        def to_and_fro(connection: Connection, value: Tensor, payload: Tensor) -> list[Tensor]:
            header = _encoder.encode(Pushed(order.codec, value.numel(), order.times))
            try:
                connection.send(header, [payload], timeout=PATIENCE)
                frame = connection.receive(lambda _, lengths: [_bytes(n) for n in lengths], timeout=PATIENCE)
            except TimeoutError:
                raise TimeoutError(connection.peer) from None
            message = _read(frame.header)
            encoded = isinstance(message, Pulled) and message.encoded
            return [buffer for buffer in frame.buffers if isinstance(buffer, Tensor)] if encoded else []

        with ThreadPoolExecutor(len(values)) as pool:
            pulled = list(pool.map(to_and_fro, self._connections.values(), values, sent))
        for value, payloads in zip(values, pulled, strict=True):
            for payload in payloads:
                value += _numbers(order.codec, payload, value)

    def _drop(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


class Echo:
    """A shard, as far as an exchange needs one: decodes what comes, and sends as much back."""

    def __init__(self, host: str, credentials: Credentials, dtype: torch.dtype):
        self.dtype = dtype
        self._listener = Listener(self._serve, host=host, credentials=credentials)
        self.address = self._listener.address

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def answer(self, asked: Pushed, payload: Tensor) -> list[Tensor]:
        """The buffers that go back: all numbers, or what moves a shadow by them where that is fewer bytes."""
        if asked.codec == "none":
            return [payload]
        came = _numbers(asked.codec, payload, torch.empty(asked.numbers, dtype=self.dtype))
        step = _written(asked.codec, came, feedback=True)
        return [step] * asked.times if asked.times * step.nbytes < came.nbytes else [came]

    def _serve(self, connection: Connection) -> None:
        while True:
            frame = _awaited(connection, lambda _, lengths: [_bytes(n) for n in lengths])
            asked, buffers = _read(frame.header), frame.buffers
            if not isinstance(asked, Pushed) or len(buffers) != 1 or not isinstance(buffers[0], Tensor):
                raise FrameError("no message", "sent something else than numbers")
            answer = self.answer(asked, buffers[0])
            encoded = asked.codec != "none" and answer[0].dtype == torch.uint8
            connection.send(_encoder.encode(Pulled(encoded)), answer, timeout=PATIENCE)


def attend(lead: Connection, here: Here, links: Links | None = None) -> None:
    """One part of the job, until the lead says that it is over; a worker with its links. ConnectionError where the
    lead is lost."""
    send(lead, here)
    while isinstance(order := receive(lead), Try):
        assert links is not None, "shards are not told to try"
        send(lead, links.tried(order))


def send(connection: Connection, message: Message) -> None:
    connection.send(_encoder.encode(message), timeout=PATIENCE)


def receive_here(connection: Connection) -> Message:
    """What a part says first, which it does at once. ConnectionError, TimeoutError."""
    return _read(connection.receive(lambda header, lengths: None, timeout=PATIENCE).header)


def receive(connection: Connection) -> Message:
    """The next message, however long it takes. ConnectionError."""
    return _read(_awaited(connection, lambda header, lengths: None).header)


def _awaited(connection: Connection, into: Into) -> Frame:
    """The next frame, however long it takes to begin; then `PATIENCE` for the rest of it. ConnectionError."""
    while True:
        try:
            return connection.receive(into, timeout=PATIENCE)
        except TimeoutError as error:
            if connection.ended:
                raise ConnectionError(f"began a frame and did not end it: {error}") from None


def _read(header: bytes) -> Message:
    try:
        message: Message = _decoder.decode(header)
    except msgspec.DecodeError as error:
        raise FrameError("no message", f"sent what is no message: {error}") from None
    return message


def _written(codec: str, value: Tensor, feedback: bool) -> Tensor:
    """As it travels. feedback: what that loses is computed, too, as whoever sends it does."""
    if codec == "none":
        return value
    writes = codec_of(codec)
    payload = to_bytes(writes, value)
    if feedback:
        value - from_bytes(writes, payload, _piece(value), value.dtype)
    return payload


def _numbers(codec: str, payload: Tensor, like: Tensor) -> Tensor:
    return from_bytes(codec_of(codec), payload, _piece(like), like.dtype)


def _piece(value: Tensor) -> Piece:
    return Piece("trial", (0,), (value.numel(),))


def _bytes(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.uint8)
