"""The coordinator as a process: messages in, journal first, then what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.coordinator import Coordinator
from shoal.sync.server.effects import Effect, Send, Summary, Write
from shoal.sync.server.messages import Address
from shoal.sync.server.node.journal_file import JournalFile
from shoal.sync.server.node.station import Event, Lost, Said, Station

# Messages that are taken in before the journal is made durable once for all of them.
_TOGETHER = 256


class Conductor:
    """Runs the coordinator until it is told to end.

    written: is given each record, once it is in the journal; noted: messages that the coordinator itself has no use
    for (`Noted`, `Saved`, and each `Push` and `Hello` before it is handled), with who
    said them. gone: told of whom the connection was lost with; refused: of who is told that it cannot take part.
    """

    def __init__(
        self, machine: Coordinator, station: Station, journal: JournalFile, *,
        written: Callable[[r.AnyRecord], None], noted: Callable[[Address, m.AnyMessage], None],
        gone: Callable[[Address], None], refused: Callable[[Address, m.Refused], None],
    ):  # fmt: skip
        self.machine, self.station, self.journal = machine, station, journal
        self._written, self._noted, self._gone, self._refused = written, noted, gone, refused
        self._ticked = time.monotonic()

    def run(self, step: Callable[[], bool]) -> None:
        """step: is called after each batch of events, at least once in `retry` seconds; True = it is over."""
        while not step():
            first = self.station.next(self._patience())
            events = [first] if first is not None else []
            while len(events) < _TOGETHER and (more := self.station.next(0.0)) is not None:
                events.append(more)
            effects = [effect for event in events for effect in self._take(event)]
            now, alarm = time.monotonic(), self.machine.alarm
            if now - self._ticked >= self.machine.rules.retry / 2 or (alarm is not None and now >= alarm):
                self._ticked = now
                effects += self.machine.tick(now)
            self.do(effects)

    def do(self, effects: Sequence[Effect]) -> None:
        """Journal first: nobody is told of what is not in it. All that came together is made durable at once."""
        records: list[r.AnyRecord] = []
        durable = False
        for effect in effects:
            if isinstance(effect, Write):
                records.append(effect.what)
                durable |= effect.durable
            elif isinstance(effect, Summary):
                self.journal.append(records, False)
                self.journal.mark(effect.version, effect.records)
                self._tell(records)
                records = []
        if records or durable:
            self.journal.append(records, durable)
            self._tell(records)
        for effect in effects:
            if isinstance(effect, Send):
                if isinstance(effect.message, m.Refused):
                    self._refused(effect.to, effect.message)
                self.station.send(effect.to, effect.message)

    def _tell(self, records: Sequence[r.AnyRecord]) -> None:
        for record in records:
            self._written(record)

    def _patience(self) -> float:
        """Seconds until something is to be done though nobody says anything."""
        now = time.monotonic()
        ends = self._ticked + self.machine.rules.retry / 2
        alarm = self.machine.alarm
        return max(0.0, (ends if alarm is None else min(ends, alarm)) - now)

    def _take(self, event: Event) -> list[Effect]:
        now = time.monotonic()
        if isinstance(event, Lost):
            self._gone(event.address)
            return self.machine.lost(event.address, now) if event.address.role in ("worker", "shard") else []
        assert isinstance(event, Said)
        message = event.message
        if isinstance(message, m.Look):
            who = event.sender
            # Of all that look, copies of shards are those that have taken the place of others.
            came = self.machine.replaced(who.number, who.copy, now) if who.role == "shard" else []
            return [*came, self._look(who)]
        if isinstance(message, m.Noted | m.Saved | m.Push | m.Hello):
            self._noted(event.sender, message)
        if isinstance(message, m.Noted | m.Saved) or not isinstance(message, _HEARD):
            return []
        return self.machine.handle(event.sender, message, now)

    def _look(self, sender: Address) -> Effect:
        at = self.machine.at
        return Send(sender, m.Seen(at.version, at.samples.used, at.copies.primaries()))


# What the coordinator understands; of a peer that says anything else, that is passed over.
_HEARD = m.Join | m.Leave | m.Heartbeat | m.Ask | m.Push | m.Hello | m.Staged | m.Combined | m.Applied
