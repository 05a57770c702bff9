"""`codec = auto` of a job whose parts are on several machines: which codec pays between its workers and its servers.

All workers push to all shards and pull from them at the same time, as in a round (`trial`). So what several workers
send to one machine shares its link in a trial as it will in training. Workers that do not wait for each other keep the
same links busy all the time, and a round of all of them takes as long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from shoal.errors import JobError, RankError
from shoal.sync.choose import Trials, fastest
from shoal.sync.server.node.refusals import Refusals
from shoal.sync.server.node.trial import PATIENCE, Here, Message, Over, Tried, Try, receive, receive_here, send
from shoal.sync.server.wire import Connection, Credentials, Listener

# How often parts may be lost, or not be reached, within the seconds of trying.
_ATTEMPTS = 5
# Seconds that each attempt waits for the loss of a shard that was not reached: if its machine has vanished, the lead's
# connection with it tells so after a minute, which is within all attempts.
_LEARNT = 10.0
# Seconds between two looks for who is there; until it is said that answers are missing; and after that until somebody
# is named: a worker has to connect, send and hear, and knows of a silent shard before.
_LOOK, _SOON, _ANSWER = 1.0, 10.0, 2 * PATIENCE


class Gone(Exception):
    """A part was lost, or did not answer, while an exchange was tried. The message: which."""


class Unreached(Gone):
    """A worker cannot connect with a shard that is there. The message: which, and why."""


class Silent(Gone):
    """Somebody is connected and does not answer. The message: who, and for how long."""


class _Part(NamedTuple):
    connection: Connection
    here: Here


class Lead:
    """Knows who is there, and lets all workers exchange at the same time."""

    def __init__(
        self, parts: Collection[str], host: str, credentials: Credentials, say: Callable[[str], None] = print,
        watch: Callable[[Collection[str]], None] | None = None,
    ):  # fmt: skip
        """parts: all of the job, such as `worker 0` and `server 1`. say: of who is refused or silent.

        watch: told who is there, about once a second while not all are, and when they are.
        """
        self._say, self._watch = say, watch
        self._workers = sorted(part for part in parts if part.startswith("worker "))
        self._shards = sorted((part for part in parts if part.startswith("server ")), key=_number)
        self._there: dict[str, _Part] = {}
        self._told: dict[str, Tried] = {}
        self._turn = 0
        self._news = threading.Condition()
        self._listener = Listener(self._serve, host=host, credentials=credentials, refused=Refusals(say))
        self.address = self._listener.address

    def __enter__(self) -> Lead:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def gather(self) -> None:
        """Returns when all parts are there."""
        complete = False
        while not complete:
            with self._news:
                complete = self._news.wait_for(
                    lambda: len(self._there) == len(self._workers) + len(self._shards), timeout=_LOOK
                )
                here = set(self._there)
            if self._watch is not None:
                self._watch(here)

    def exchange(self, codec: str, numbers: Sequence[int], times: int, feedback: bool) -> float:
        """Seconds that it takes the slowest worker, of those of `Try`. numbers: with each shard.

        Gone; of that, Unreached and Silent.
        """
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
        self._await(before)
        with self._news:
            return self._seconds(before)

    def _await(self, before: Mapping[str, _Part]) -> None:
        """Until all workers have told, one has told of a silent shard, or a part was lost; or it has taken too long."""

        def over() -> bool:
            silent = any(told.silent for told in self._told.values())
            return silent or self._there != before or len(self._told) == len(self._workers)

        with self._news:
            if self._news.wait_for(over, timeout=_SOON):
                return
            late = self._late()
        self._say(f"links are tried: no answer for {_SOON:g} s from {', '.join(late)}")
        with self._news:
            self._news.wait_for(over, timeout=_ANSWER)

    def _late(self) -> list[str]:
        return [part for part in self._workers if part not in self._told]

    def _seconds(self, before: Mapping[str, _Part]) -> float:
        """What the workers' answers mean. before: who was there when they were asked."""
        unreached = next((told.unreached for told in self._told.values() if told.unreached), "")
        silent = next((told.silent for told in self._told.values() if told.silent), "")
        if unreached:
            self._news.wait_for(lambda: self._there != before, timeout=_LEARNT)
        if lost := [part for part in before if self._there.get(part) != before[part]]:
            raise Gone(lost[0])
        if silent:
            raise Silent(silent)
        if late := self._late():
            raise Silent(f"{late[0]} has not answered the coordinator for {_SOON + _ANSWER:g} s")
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
        try:
            here = receive_here(connection)
        except TimeoutError:
            return self._say(f"{connection.peer} is connected, and has said nothing for {PATIENCE:g} s")
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
    happens again and again, or one is connected and silent, with which training would not go on either; JobError where
    it is a shard that a worker cannot connect with.
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
        except Silent as gone:
            fix = "see whether its process is stopped, or its machine asleep or cut off; then start the run again"
            raise RankError(f"while links were tried, {gone}", fix=fix) from None
        except Gone as gone:
            unreached = ""
            say(f"{gone} was lost while links were tried: once more when all are there")
    if unreached:
        fix = (
            "let workers connect with the machines of servers, whose addresses are `shoal join --host` and server.host;"
            " where one has not answered in time, see whether its process is stopped"
        )
        raise JobError(unreached, fix=fix)
    raise RankError(f"links were lost {_ATTEMPTS} times while they were tried", fix="name a codec, e.g. int8, or none")


def _since(began: float) -> float:
    return time.perf_counter() - began


def _number(part: str) -> int:
    return int(part.split()[1])
