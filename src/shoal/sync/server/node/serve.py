"""A copy of a server shard as a process: what workers push and pull, commits in order, its part of checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from shoal.errors import JobError, RankError
from shoal.sync.server import messages as m
from shoal.sync.server.effects import Effect, Keep, Send, Write
from shoal.sync.server.messages import COORDINATOR, Address
from shoal.sync.server.node.shard_log import ShardLog
from shoal.sync.server.node.silence import Silence
from shoal.sync.server.node.station import Event, Lost, Said, Station
from shoal.sync.server.shard import ServerShard


class Serving:
    """Runs a shard until the coordinator says that the job is over.

    save: is given a version and the values of its manifest when the shard is there, and answers by `said`; it must
    not wait.
    """

    def __init__(
        self, machine: ServerShard, station: Station, log: ShardLog | None, *,
        save: Callable[[int, bytes], None], poll: Callable[[], Sequence[m.Saved]],
        say: Callable[[str], None] | None = None,
    ):  # fmt: skip
        """log: of a shard of one copy. poll: what has become of saves since it was last asked. say: of `Silence`."""
        self.machine, self.station, self.log, self._save, self._poll = machine, station, log, save, poll
        self._ticked = float("-inf")
        # The coordinator has answered: since its latest loss, and ever.
        self._greeted = self._known = False
        self._whole = time.monotonic()
        self._silence = Silence(f"server {machine.number}", station.book, say, self._whole)

    def run(self) -> None:
        """JobError where this copy cannot take part: the coordinator refuses what it holds, or does not let it in."""
        self._hello()
        while True:
            event = self.station.next(self.machine.retry / 4)
            if isinstance(event, Said) and isinstance(event.message, m.Over) and event.sender == COORDINATOR:
                return
            if event is not None:
                self._take(event)
            if (refused := self.machine.refused) is not None:
                if not self.machine.logged:
                    raise ConnectionResetError(f"{refused.why}; a new copy takes all from another one")
                raise JobError(refused.why, fix=refused.fix)
            for saved in self._poll():
                self.station.send(COORDINATOR, saved)
            now = time.monotonic()
            if now - self._ticked >= self.machine.retry / 2:
                self._ticked = now
                self._check(now)
                if not self._greeted:
                    self._hello()
                self._do(self.machine.tick(now))

    def _check(self, now: float) -> None:
        """That there is a coordinator, and that this copy gets what it is to apply."""
        if self.station.connected(COORDINATOR):
            self._silence.heard(now)
        self._silence.check(now)
        if not self.machine.stuck or self.machine.logged:
            self._whole = now
        elif now - self._whole > _STUCK:
            raise ConnectionResetError("this copy has missed what workers pushed; a new one takes it from another")

    def _hello(self) -> None:
        self._do(self.machine.hello())

    def _take(self, event: Event) -> None:
        if isinstance(event, Lost):
            # Whoever it was comes back by itself; to a coordinator that does, this side says hello again.
            if event.address == COORDINATOR:
                if event.error is not None and not self._known:
                    raise event.error
                self._greeted = False
            self.machine.lost(event.address)
            return
        sender, message, tensors = event
        if sender == COORDINATOR:
            self._greeted = self._known = True
        if isinstance(message, m.Clone):
            self._do(self.machine.give(message.copy))
            return
        if isinstance(message, m.Kept):
            if self.log is not None:
                self.log.forget(message.version)
            return
        if not isinstance(message, _HEARD) or (isinstance(message, _LEADS) and sender != COORDINATOR):
            return
        try:
            effects = self.machine.handle(sender, message, tensors, time.monotonic())
        except JobError as error:
            # Its mistake, which changed nothing here: it is told, and let go.
            key = getattr(message, "key", None)
            self.station.send(sender, m.Refused(key.incarnation if key else 0, error.what, error.fix))
            self.station.drop(sender)
            return
        self._do(effects)
        # By now they are in the staged gradient and in the log; what is passed on to another copy is still on its way.
        if isinstance(message, m.Stage) and not any(isinstance(each, Send) and each.tensors for each in effects):
            self.station.give_back(tensors)

    def _do(self, effects: Sequence[Effect]) -> None:
        """In order: what is to be durable is, before anybody is told of it."""
        for effect in effects:
            if isinstance(effect, Send):
                self.station.send(effect.to, effect.message, effect.tensors)
            elif isinstance(effect, Write):
                assert self.log is not None
                self.log.append(effect.what, effect.tensors, effect.durable)
            elif isinstance(effect, Keep):
                # Whoever goes on from this checkpoint needs what the segment begins with.
                self._turn(effect.version)
                self._save(effect.version, effect.values)

    def _turn(self, version: int) -> None:
        """What is not part of this version goes into the next segment of the log, with all that it will need."""
        if self.log is None:
            return
        self.log.turn(version)
        for message, tensors in self.machine.carried():
            self.log.append(message, tensors, durable=True)


# Seconds after which a copy that lacks bytes gives up.
_STUCK = 10.0


def join(machine: ServerShard, station: Station, patience: float) -> None:
    """Fills a new copy of a shard with what the one that workers talk to holds.

    RankError where that does not answer for so many seconds: then no copy of it is left.
    """
    deadline, asked = time.monotonic() + patience, float("-inf")
    while (now := time.monotonic()) < deadline:
        if now - asked >= machine.retry:
            asked = now
            station.send(COORDINATOR, m.Look())
        event = station.next(machine.retry / 4)
        if not isinstance(event, Said):
            continue
        if isinstance(event.message, m.Seen):
            first = Address("shard", machine.number, event.message.primaries[machine.number])
            station.send(first, m.Clone(machine.number, machine.copy))
        elif isinstance(event.message, m.Whole):
            machine.take(event.message, event.tensors)
        elif isinstance(event.message, m.Stage):
            machine.handle(event.sender, event.message, event.tensors, now)
        if machine.filled:
            return
    raise RankError(
        f"no copy of server shard {machine.number} is left: what it held since the last checkpoint is lost",
        fix="resume the run: it goes on from the checkpoint; with server.copies=1 a log on disk would hold it all",
    )


# What only the coordinator may say.
_LEADS = m.Apply | m.Combine | m.Drop | m.Copies | m.Save | m.Refused
_HEARD = m.Stage | m.Apply | m.Pull | m.Combine | m.Drop | m.Copies | m.Save | m.Refused
