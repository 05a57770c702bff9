"""What the coordinator does about what it decides: records into the journal, which move where it stands; messages."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.sync.server import messages as m
from shoal.sync.server.effects import Effect, Send, Summary, Write
from shoal.sync.server.members import Member
from shoal.sync.server.messages import Address, Key, Message
from shoal.sync.server.records import AnyRecord
from shoal.sync.server.standing import Standing


class Acts:
    """Effects in the order in which they are to be done, until the host takes them. at: where the coordinator stands
    after all of them."""

    def __init__(self, at: Standing):
        self.at = at
        self._effects: list[Effect] = []

    def write(self, record: AnyRecord, durable: bool = True) -> None:
        self._effects.append(Write(record, durable=durable))
        self.at.take(record)

    def say(self, to: Address, message: Message) -> None:
        self._effects.append(Send(to, message))

    def add(self, effects: Iterable[Effect]) -> None:
        self._effects += effects

    def say_primaries(self, member: Member) -> None:
        copies = self.at.copies
        self.say(member.address, m.Primaries(copies.epoch, copies.primaries()))

    def say_copies(self, shard: int) -> None:
        """Lest the first of them does not know that it is, or of a new one."""
        copies = self.at.copies.of_shard[shard]
        for copy in copies:
            self.say(Address("shard", shard, copy), m.Copies(self.at.copies.epoch, copies))

    def drop(self, key: Key) -> None:
        """After the journal has it, never before: bytes that are gone cannot be committed any more."""
        for address in self.at.copies.addresses():
            self.say(address, m.Drop((key,)))

    def save(self, values: bytes) -> None:
        """Has the shards save the latest version."""
        told = m.Save(self.at.version, values)
        self._effects.append(Summary(self.at.version, tuple(self.at.summary())))
        for shard, copy in enumerate(self.at.copies.primaries()):
            self.say(Address("shard", shard, copy), told)

    def taken(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects
