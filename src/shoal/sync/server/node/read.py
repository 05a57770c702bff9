"""Somebody who only reads: the weights of one version, from all shards of a job that goes on training meanwhile.

A shard gives the weights of a version that it is at, or that it comes to. So a reader asks for the version that the
coordinator is at; where commits come faster than messages, for one that is still to come, which every shard then gives
at the moment in which it is there. Nobody waits for a reader.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from shoal.errors import JobError, RankError
from shoal.sync.server import messages as m
from shoal.sync.server.messages import COORDINATOR, Address, Key
from shoal.sync.server.node.station import Event, Lost, Said, Station

# Attempts before it is given up; they come to versions further and further ahead.
_TRIES = 10
# Seconds between two questions to the coordinator, those without a commit after which training stands still, and those
# without a byte after which it is said for whom a reader waits, and somebody is given up.
_TICK, _STILL, _SOON, _PATIENCE = 0.5, 2.0, 5.0, 60.0
_ASK_THE_RUN = "the run says for whom it waits (its screen, RUN/log.txt): start that, then try again"


class Read(NamedTuple):
    """What each shard holds of one version. parts: of each shard, which pieces, and their tensors."""

    version: int
    parts: list[tuple[m.Pulled, Sequence[Tensor]]]


class _Again(NamedTuple):
    """An attempt failed. ahead: of the coordinator's version, the next one to ask for. pause: seconds before it."""

    ahead: int
    pause: float = 0.0


class Reader:
    """Reads once. station: of any name; one that calls coordinator and shards. say: gets a sentence on each that is
    waited for longer than a few seconds."""

    def __init__(self, station: Station, say: Callable[[str], None]):
        self._station, self._say = station, say
        self._lost = 0
        self._told: set[str] = set()

    def read(self) -> Read:
        """All weights of one version. JobError where nobody lives any more or this side is not let in; RankError where
        somebody does not answer, or every attempt came too late."""
        ahead, nonce = 0, secrets.randbits(62)
        for attempt in range(_TRIES):
            # A shard gives each connection of a reader one copy of its weights: every attempt has its own.
            self._station.rename(Address("reader", 0, nonce + attempt))
            seen = self._look()
            found = self._pull(seen, seen.version + ahead, Key(0, 0, attempt))
            if isinstance(found, Read):
                return found
            ahead = found.ahead
            time.sleep(found.pause)
        raise RankError(
            f"no version could be had of all shards in {_TRIES} attempts",
            fix=f"try again; or take a checkpoint: `shoal ckpt show {self._station.book.folder.parent}`",
        )

    def _look(self) -> m.Seen:
        """What the coordinator is at."""
        self._station.send(COORDINATOR, m.Look())
        since = time.monotonic()
        while (waited := time.monotonic() - since) < _PATIENCE:
            event = self._station.next(_TICK)
            if (seen := self._seen(event)) is not None:
                return seen
            self._waits("the coordinator", waited)
        raise RankError(f"the coordinator has not answered for {_PATIENCE:.0f} s", fix=_ASK_THE_RUN)

    def _waits(self, whom: str, seconds: float) -> None:
        """Says it once of each."""
        if seconds >= _SOON and whom not in self._told:
            self._told.add(whom)
            self._say(f"waits for {whom}, at most {_PATIENCE:.0f} s")

    def _seen(self, event: Event | None) -> m.Seen | None:
        """The coordinator's answer, if it is that. Where its connection broke, it may be starting again: asks again."""
        if isinstance(event, Said) and isinstance(event.message, m.Seen):
            self._lost = 0
            return event.message
        if isinstance(event, Lost) and event.error is not None:
            raise event.error
        if isinstance(event, Lost) and event.address == COORDINATOR:
            self._lost += 1
            if self._lost > 1:
                run = self._station.book.folder.parent
                fix = f"its checkpoints: `shoal ckpt show {run}`"
                raise JobError("its coordinator has ended", where=str(run), fix=fix)
            self._station.send(COORDINATOR, m.Look())
        return None

    def _pull(self, seen: m.Seen, version: int, key: Key) -> Read | _Again:
        for shard, copy in enumerate(seen.primaries):
            self._station.send(Address("shard", shard, copy), m.Pull(key, version, None, True))
        found: dict[int, tuple[m.Pulled, Sequence[Tensor]]] = {}
        newest, since, asked, bytes_received = seen.version, time.monotonic(), time.monotonic(), 0
        while len(found) < len(seen.primaries):
            event, now = self._station.next(_TICK), time.monotonic()
            if (later := self._seen(event)) is not None and later.version > newest:
                newest, since = later.version, now
            elif isinstance(event, Lost) and event.address.role == "shard":
                return _Again(0, _TICK)
            elif isinstance(event, Said) and getattr(event.message, "key", None) == key:
                if isinstance(event.message, m.Gone):
                    return _further(event.message, seen.version, version)
                if isinstance(event.message, m.Pulled):
                    found[event.message.shard] = event.message, event.tensors
            if newest < version:
                if now - since > _STILL:
                    return _Again(0)
                if now - asked > _TICK:
                    asked = now
                    self._station.send(COORDINATOR, m.Look())
                continue
            # It is there: its weights are on their way.
            received = self._station.traffic()[1]
            if received != bytes_received:
                bytes_received, since = received, now
                continue
            missing = min(set(range(len(seen.primaries))) - found.keys(), default=None)
            if missing is not None and now - since > _PATIENCE:
                what = f"server shard {missing} has not answered for {_PATIENCE:.0f} s"
                raise RankError(what, fix=_ASK_THE_RUN)
            if missing is not None:
                self._waits(f"server shard {missing}", now - since)
        return Read(version, [found[shard] for shard in sorted(found)])


def _further(gone: m.Gone, seen: int, asked: int) -> _Again:
    """Twice as far ahead as it would have had to be; or the same again, where other readers have all places."""
    if gone.newest == asked:
        return _Again(asked - seen, 1.0)
    return _Again(max(2, 2 * (gone.newest - seen), 2 * (asked - seen)))
