"""A worker's state machine beside the thread that computes: it goes on saying that it lives while that is busy."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from shoal.errors import JobError
from shoal.sync.server import messages as m
from shoal.sync.server.effects import Effect, Send
from shoal.sync.server.messages import COORDINATOR, Key, Range
from shoal.sync.server.node.silence import Silence
from shoal.sync.server.node.station import Event, Lost, Said, Station
from shoal.sync.server.worker import Pushed, Worker

# Seconds between two looks at what was not answered.
_TICK = 0.1
# States without a gradient that is computed, or is being.
_EMPTY = ("joining", "asking", "pulling")


class Granted(NamedTuple):
    """primaries: the copies of shards to pull from. whole: as of `Worker`."""

    grant: m.Grant
    primaries: tuple[int, ...]
    whole: bool


class Client:
    """Drives one worker from `start` to `close`. What others must know (what is pulled, the answer) they `wait` for.

    A worker that was fenced joins again by itself, as a new incarnation: whatever is computed for the old one is void.
    """

    def __init__(
        self, machine: Worker, station: Callable[[int], Station], leaving: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] | None = None,
    ):  # fmt: skip
        """station: for a nonce, one that listens to nobody and calls coordinator and shards.

        leaving: whether the worker has been asked to leave. say: as of `Silence`.
        """
        self.machine, self._leaving = machine, leaving
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._closing = False
        # Parts of pushes that shards say they do not have, of (shard, copy): for the worker's other ranks, too.
        self._missing: list[tuple[int, int]] = []
        nonce = secrets.randbits(62)
        self.station = station(nonce)
        now = time.monotonic()
        self._silence = Silence(f"worker {machine.number}", self.station.book, say, now)
        with self._changed:
            self._do(machine.start(nonce, now))
        self._thread = threading.Thread(target=self._run, name="talks to the server", daemon=True)
        self._thread.start()

    def wait(self, *states: str, timeout: float | None = None) -> str:
        """Until the worker is in one of these states, or for so many seconds; the state it is in.

        JobError where the coordinator refuses it, RankError where there is no coordinator any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.machine.state in states or self._error or self._missing, timeout)
            if self._error:
                raise self._error
            return self.machine.state

    def granted(self) -> Granted | None:
        """What the worker pulls or computes on now."""
        with self._changed:
            grant = self.machine.grant
            return Granted(grant, self.machine.primaries, self.machine.whole) if grant is not None else None

    def pulled(self, grant: m.Grant) -> dict[int, tuple[m.Pulled, Sequence[object]]] | None:
        """The weights that came for it; None where it is void, or another one of the same clock has come since."""
        with self._changed:
            return dict(self.machine.pulled) if self._has(grant) and self.machine.state == "computing" else None

    def not_pulled(self, grant: m.Grant) -> None:
        """Another rank could not pull: asks for a newer version, unless that has been granted meanwhile."""
        with self._changed:
            if self._has(grant):
                self._do(self.machine.not_pulled(time.monotonic()))

    def push(
        self, key: Key, gradients: Mapping[int, Pushed], weight: float, loss_sum: float, samples: Range,
        parts: int, spent: m.Spent, owes: bool = False,
    ) -> bool:  # fmt: skip
        """As `Worker.push`; False where this clock is void: the worker was fenced meanwhile."""
        with self._changed:
            if not self._is(key, "computing"):
                return False
            now = time.monotonic()
            self._missing.clear()
            self._do(
                self.machine.push(
                    gradients, weight, loss_sum, now, samples=samples, parts=parts, spent=spent, owes=owes
                )
            )
            self._missing.clear()
            return True

    def missing(self) -> list[tuple[int, int]]:
        """(shard, copy) to which this worker's ranks must push again, since it was last asked."""
        with self._changed:
            found, self._missing = self._missing, []
            return found

    def answer(self, key: Key) -> m.Answer | None:
        """To the push of this clock, if there is one by now."""
        with self._changed:
            answer = self.machine.answer
            return answer if answer is not None and answer.key == key else None

    def note(self, message: m.Message) -> None:
        """Tells the coordinator something that the worker itself has no part in."""
        self.station.send(COORDINATOR, message)

    def close(self) -> None:
        """Leaves, if the worker takes part still."""
        with self._changed:
            self._closing = True
            if self.machine.state not in ("refused", "left", "fenced"):
                self._do(self.machine.leave(time.monotonic()))
        self.station.wake()
        self._thread.join(5.0)
        self.station.close()

    def _has(self, grant: m.Grant) -> bool:
        return self.machine.grant == grant

    def _is(self, key: Key, state: str) -> bool:
        return self.machine.key == key and self.machine.state == state

    def _run(self) -> None:
        try:
            self._drive()
        except Exception as error:
            # Whoever waits must not wait for ever.
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _drive(self) -> None:
        while not self._closing:
            event = self.station.next(_TICK)
            with self._changed:
                if self._closing:
                    return
                self._take(event)
                self._changed.notify_all()

    def _take(self, event: Event | None) -> None:
        now = time.monotonic()
        machine = self.machine
        if isinstance(event, Said):
            if event.sender == COORDINATOR and not isinstance(event.message, m.Refused):
                self._silence.heard(now)
            if isinstance(event.message, m.Refused) and event.sender != COORDINATOR:
                self._error = JobError(event.message.why, fix=event.message.fix)
            self._do(machine.handle(event.message, event.tensors, now))
        elif isinstance(event, Lost):
            self._error = event.error or self._error
            machine.lost()
        if self._leaving() and not machine.leaves:
            self._do(machine.retire(now))
        linked = self.station.connected(COORDINATOR)
        empty = machine.state in _EMPTY and not machine.owes
        if machine.leaves and empty and self._silence.lasts(now, linked):
            # Nobody is there to let it go, and it has computed nothing that could be lost.
            machine.state = "finished"
        self._do(machine.tick(now))
        if machine.refused is not None:
            self._error = JobError(machine.refused.why, fix=machine.refused.fix)
        if machine.state == "fenced":
            nonce = secrets.randbits(62)
            effects = machine.start(nonce, now)
            self.station.rename(machine.address)
            self._do(effects)
        if machine.state in ("computing", "finished") or (machine.state == "pulling" and linked):
            self._silence.excuse(now)
        self._silence.check(now, linked)

    def _do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, Send)
            if isinstance(effect.message, m.Stage):
                self._missing.append((effect.to.number, effect.to.copy))
            self.station.send(effect.to, effect.message, effect.tensors)


__all__ = ["Client"]
