"""A bad network between workers and a listener: frames are cut off, late, or there twice, by a seed."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress

from shoal.sync.server.wire.frame import PREFIX, Limits, read_prefix

# Bytes that each side says before its first frame: a hello, then its proof behind the name or the verdict.
_GREETING = {"there": (38, 96), "back": (38, 33)}


class Faulty:
    """Passes on what comes to `address`, to the listener at `target` and back; greetings always go through.

    cut, duplicate, delay: the probability for each frame that the connection ends in its middle, that it comes twice,
    that it comes `seconds` later. `happened` counts them. One seed gives one series of faults for each direction of
    the n-th connection.
    """

    def __init__(
        self, target: tuple[str, int], seed: int, *, cut: float = 0.0, duplicate: float = 0.0, delay: float = 0.0,
        seconds: float = 0.05,
    ):  # fmt: skip
        self.happened = {"cut": 0, "duplicate": 0, "delay": 0}
        self._target, self._seed, self._seconds = target, seed, seconds
        self._odds = {"cut": cut, "duplicate": duplicate, "delay": delay}
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.address: tuple[str, int] = self._server.getsockname()
        self._threads[0].start()

    def __enter__(self) -> Faulty:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._server, *self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in (self._server, *self._open):
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):
            for number in range(1 << 30):
                worker = self._server.accept()[0]
                listener = socket.create_connection(self._target)
                self._open += [worker, listener]
                for way, source, sink in (("there", worker, listener), ("back", listener, worker)):
                    chance = random.Random(f"{self._seed} {number} {way}")
                    thread = threading.Thread(target=self._pass, args=(way, source, sink, chance), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pass(self, way: str, source: socket.socket, sink: socket.socket, chance: random.Random) -> None:
        """One direction of one connection, until either end is gone."""
        with suppress(OSError, EOFError):
            for size in _GREETING[way]:
                sink.sendall(_exactly(source, size))
            while True:
                frame = _frame(source)
                fault = self._fault(chance)
                if fault == "delay":
                    time.sleep(self._seconds)
                if fault == "cut":
                    sink.sendall(frame[: chance.randrange(len(frame))])
                    break
                sink.sendall(frame * 2 if fault == "duplicate" else frame)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _fault(self, chance: random.Random) -> str:
        at = chance.random()
        for fault, odds in self._odds.items():
            if at < odds:
                self.happened[fault] += 1
                return fault
            at -= odds
        return ""


def _frame(source: socket.socket) -> bytes:
    data = _exactly(source, PREFIX.size)
    prefix = read_prefix(data, Limits())
    table = _exactly(source, 12 * prefix.buffers)
    payload = sum(int.from_bytes(table[at : at + 8], "big") for at in range(0, len(table), 12))
    return data + table + _exactly(source, prefix.rest - len(table) + payload)


def _exactly(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)
