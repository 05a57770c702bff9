"""`codec = auto` of a job whose parts are on several machines: which codec pays between its workers and its servers.

All workers push to all shards and pull from them at the same time, as in a round (`trial`). So what several workers
send to one machine shares its link in a trial as it will in training. Workers that do not wait for each other keep the
same links busy all the time, and a round of all of them takes as long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from shoal.errors import JobError, RankError
from shoal.sync.choose import Trials, fastest
from shoal.sync.server.node.trial import PATIENCE, Here, Message, Over, Tried, Try, receive, send
from shoal.sync.server.wire import Connection, Credentials, Listener

# How often parts may be lost, or not be reached, within the seconds of trying.
_ATTEMPTS = 5
# Seconds that each attempt waits for the loss of a shard that was not reached: if its machine has vanished, the lead's
# connection with it tells so after a minute, which is within all attempts.
_LEARNT = 10.0


class Gone(Exception):
    """A part was lost, or did not answer, while an exchange was tried. The message: which."""


class Unreached(Gone):
    """A worker cannot connect with a shard that is there. The message: which, and why."""


class _Part(NamedTuple):
    connection: Connection
    here: Here


class Lead:
    """Knows who is there, and lets all workers exchange at the same time."""

    def __init__(self, parts: Collection[str], host: str, credentials: Credentials):
        """parts: all of the job, such as `worker 0` and `server 1`."""
        self._workers = sorted(part for part in parts if part.startswith("worker "))
        self._shards = sorted((part for part in parts if part.startswith("server ")), key=_number)
        self._there: dict[str, _Part] = {}
        self._told: dict[str, Tried] = {}
        self._turn = 0
        self._news = threading.Condition()
        self._listener = Listener(self._serve, host=host, credentials=credentials)
        self.address = self._listener.address

    def __enter__(self) -> Lead:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def gather(self) -> None:
        """Returns when all parts are there."""
        with self._news:
            self._news.wait_for(lambda: len(self._there) == len(self._workers) + len(self._shards))

    def exchange(self, codec: str, numbers: Sequence[int], times: int, feedback: bool) -> float:
        """Seconds that it takes the slowest worker, of those of `Try`. numbers: with each shard. Gone, Unreached."""
        with self._news:
            self._turn += 1
            self._told = {}
            before, turn = dict(self._there), self._turn
            missing = [part for part in (*self._workers, *self._shards) if part not in before]
            if missing:
                raise Gone(missing[0])
            shards = tuple((before[part].here.host, before[part].here.port) for part in self._shards)
            order = Try(turn, codec, tuple(numbers), shards, times, feedback)
        for part in self._workers:
            self._send(part, before[part], order)
        with self._news:
            done = self._news.wait_for(
                lambda: self._there != before or len(self._told) == len(self._workers), timeout=2 * PATIENCE
            )
            unreached = next((told.unreached for told in self._told.values() if told.unreached), "")
            if unreached:
                self._news.wait_for(lambda: self._there != before, timeout=_LEARNT)
            lost = [part for part in before if self._there.get(part) != before[part]]
            late = [part for part in self._workers if part not in self._told]
            if lost or not done:
                raise Gone([*lost, *late][0])
            if unreached:
                raise Unreached(unreached)
            if broken := [part for part, told in self._told.items() if told.seconds < 0]:
                raise Gone(f"the connection of {broken[0]} with a server")
            return max(told.seconds for told in self._told.values())

    def end(self) -> None:
        """Tells all parts that it is over."""
        with self._news:
            there = dict(self._there)
        for name, part in there.items():
            self._send(name, part, Over())

    def _send(self, name: str, part: _Part, order: Message) -> None:
        try:
            send(part.connection, order)
        except OSError:
            # Of a connection that has ended, its own thread learns, too.
            part.connection.close()

    def _serve(self, connection: Connection) -> None:
        """The thread of one part."""
        name = connection.name
        here = receive(connection)
        if name not in (*self._workers, *self._shards) or not isinstance(here, Here):
            return
        mine = _Part(connection, here)
        with self._news:
            before, self._there[name] = self._there.get(name), mine
            self._news.notify_all()
        if before is not None:
            before.connection.close()
        try:
            while True:
                told = receive(connection)
                with self._news:
                    if isinstance(told, Tried) and told.turn == self._turn:
                        self._told[name] = told
                        self._news.notify_all()
        finally:
            with self._news:
                if self._there.get(name) is mine:
                    del self._there[name]
                self._news.notify_all()


def choose(
    lead: Lead, codecs: Sequence[str], held: Sequence[int], times: int, feedback: bool, say: Callable[[str], None]
) -> str:
    """The first of these codecs that saves enough of an exchange, or `none`: tried for at most 2 seconds, once all
    parts are there (`sync.choose`). held: numbers that each shard holds. times: as in `Try`.

    Where a part is lost meanwhile, it begins anew when it is back, wherever it listens then. RankError where that
    happens again and again, JobError where it is a shard that a worker cannot connect with.
    """

    def trial(codec: str, size: int) -> float:
        return lead.exchange(codec, [max(1, size * each // sum(held)) for each in held], times, feedback)

    unreached = ""
    for _ in range(_ATTEMPTS):
        lead.gather()
        trials = Trials(sum(held), trial, partial(_since, time.perf_counter()))
        try:
            return fastest(codecs, trials, "a push and a pull of all workers at a time", say)
        except Unreached as gone:
            unreached = str(gone)
            say(f"{unreached}: once more when all are there")
        except Gone as gone:
            unreached = ""
            say(f"{gone} was lost while links were tried: once more when all are there")
    if unreached:
        fix = (
            "let workers connect with the machines of servers, whose addresses are `shoal join --host` and server.host"
        )
        raise JobError(unreached, fix=fix)
    raise RankError(f"links were lost {_ATTEMPTS} times while they were tried", fix="name a codec, e.g. int8, or none")


def _since(began: float) -> float:
    return time.perf_counter() - began


def _number(part: str) -> int:
    return int(part.split()[1])
