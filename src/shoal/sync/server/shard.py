"""One copy of a server shard: stages pushes, applies commits in order and once. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.sync.server import messages as m
from shoal.sync.server.effects import Effect, Keep, Send, Write
from shoal.sync.server.held import Held
from shoal.sync.server.messages import COORDINATOR, Address, Apply, Key, Message, Square
from shoal.sync.server.pulls import Pulls

if TYPE_CHECKING:
    from shoal.sync.server.shadow import Shadow


@dataclass
class _Staged:
    """A push that is not decided on. of: the worker's ranks. parts: which of them have sent theirs. said: when we told
    so."""

    gradient: Any
    of: int = 1
    parts: set[int] = field(default_factory=set)
    squares: tuple[Square, ...] | None = None
    said: float = 0.0


class ServerShard:
    """Version v: exactly the commits ≤ v are applied. Give it every message and the time; do what it says.

    Memory: weights, optimizer state, one staged gradient a worker, what `Pulls` keep; with `dc` one more copy of the
    weights for each version that some worker computes on.
    """

    def __init__(
        self,
        number: int,
        held: Held,
        *,
        copy: int = 0,
        others: Sequence[int] = (),
        level: str = "snapshot",
        version: int = 0,
        logged: bool = False,
        retry: float = 1.0,
        backups: bool = False,
        shadow: Shadow | None = None,
    ):
        """others: copies to which this one, the first, passes on what workers push. version: of the weights in `held`.

        logged: staged bytes go to a durable log. retry: seconds. backups: keep what each worker pulled, for `dc`.
        shadow: what is served in place of the weights, where there is a codec; not with `hogwild`, nor with `backups`.
        """
        self.number, self.copy, self.held, self.version = number, copy, held, version
        self.refused: m.Refused | None = None
        self.others, self.logged, self.retry, self.backups = tuple(others), logged, retry, backups
        assert shadow is None or (level != "hogwild" and not backups)
        self.pulls = Pulls(number, held, level, shadow)
        self._epoch = 0
        self.staged: dict[Key, _Staged] = {}
        self._applied: dict[int, Key] = {}
        self._orders: dict[int, Apply] = {}
        self._awaited: tuple[Key, ...] | None = None
        self._combining: m.Combine | None = None
        self._summed: tuple[tuple[Key, ...], Any, tuple[Square, ...]] | None = None
        self._backup: dict[int, Any] = {}
        self._saves: dict[int, bytes] = {}
        self._given: set[int] = set()
        self._out: list[Effect] = []

    @property
    def address(self) -> Address:
        return Address("shard", self.number, self.copy)

    def hello(self) -> list[Effect]:
        """To be said to the coordinator when it is there, and again whenever either comes back."""
        return [Send(COORDINATOR, m.Hello(self.number, self.copy, self.version))]

    def recover(self, log: Iterable[tuple[m.Stage | m.Backup, Sequence[Any]]]) -> None:
        """After a crash, with `held` as it was saved at `version`: takes in what the log has of the time since."""
        for message, tensors in log:
            if isinstance(message, m.Stage):
                self._put(message, tensors)
            elif message.version == self.version:
                self._backup[message.worker] = list(tensors)

    def give(self, copy: int) -> list[Effect]:
        """All that is here, to a new copy; from now on it is passed what workers push."""
        address = Address("shard", self.number, copy)
        pieces, values, tensors = self.held.whole()
        weights = [each for kept in self._backup.values() for each in self.held.cut(kept, self.held.pieces())]
        pieces += self.held.pieces() * len(self._backup)
        keys = tuple(key for key, staged in self.staged.items() if staged.squares is not None)
        whole = m.Whole(self.version, pieces, tuple(self._backup), values, keys)
        self._given.add(copy)
        if copy not in self.others:
            self.others = (*self.others, copy)
        staged = [Send(address, stage, gradient) for stage, gradient in self.unapplied()]
        return [Send(address, whole, (*tensors, *weights)), *staged]

    @property
    def stuck(self) -> bool:
        """Whether it has been told to apply, or to add up, what it never got."""
        orders: list[Apply | m.Combine | None] = [self._orders.get(self.version + 1), self._combining]
        return any(o is not None and o.version == self.version + 1 and not self._whole(o.keys) for o in orders)

    def take(self, message: m.Whole, tensors: Sequence[Any]) -> None:
        """As a new copy: what another one gave."""
        size, count = len(self.held.pieces()), len(tensors) - len(message.backups) * len(self.held.pieces())
        self.held.fill(message.values, tensors[:count])
        self._backup = {
            worker: list(tensors[count + i * size : count + (i + 1) * size]) for i, worker in enumerate(message.backups)
        }
        self.version, self._awaited = message.version, message.staged

    @property
    def filled(self) -> bool:
        """As a new copy: all is here, also what may be committed already and was not applied where it comes from."""
        return self._awaited is not None and self._whole(self._awaited)

    def handle(self, sender: Address, message: Message, tensors: Sequence[Any], now: float) -> list[Effect]:
        """What follows from one message.

        Raises JobError for pieces that are not held here: the sender's mistake, which changes nothing. Once `refused`
        is set, this copy has no part in the job: it is to end. A new one may take all from another.
        """
        if isinstance(message, m.Stage):
            self._stage(message, tensors, now)
        elif isinstance(message, m.Apply):
            self._apply(message)
        elif isinstance(message, m.Pull):
            self._out += self.pulls.pull(sender, message, self.version)
        elif isinstance(message, m.Combine):
            self._combine(message)
        elif isinstance(message, m.Drop):
            for key in message.keys:
                self.staged.pop(key, None)
        elif isinstance(message, m.Copies):
            if message.epoch >= self._epoch:
                self._epoch = message.epoch
                self._given -= {*message.copies}
                # Who is being given everything is not among them yet.
                given = tuple(sorted(self._given))
                self.others = (*message.copies[1:], *given) if message.copies[0] == self.copy else given
        elif isinstance(message, m.Save):
            self._saves[message.version] = message.values
            self._keep()
        elif isinstance(message, m.Refused) and message.nonce == self.version:
            # Or it is an answer to what was said long ago.
            self.refused = message
        out, self._out = self._out, []
        return out

    def lost(self, sender: Address) -> None:
        """The connection with somebody ended, and with it what was on its way there."""
        if sender.role == "shard" and sender.copy in self._given:
            # A new copy is gone before it took part.
            self._given.discard(sender.copy)
            self.others = tuple(other for other in self.others if other != sender.copy)
        if sender.role == "reader":
            self.pulls.lost(sender)

    def tick(self, now: float) -> list[Effect]:
        """Says again what is staged and not decided on: the coordinator may have lost it, or have decided."""
        for key, staged in self.staged.items():
            if now - staged.said >= self.retry:
                self._say_staged(key, staged, now)
        out, self._out = self._out, []
        return out

    def carried(self) -> Iterator[tuple[m.Stage | m.Backup, tuple[Any, ...]]]:
        """What a log that begins anew at this version begins with: all that is not in `held`."""
        pieces = self.held.pieces()
        for worker, weights in self._backup.items():
            yield m.Backup(worker, self.version, pieces), self.held.cut(weights, pieces)
        yield from self.unapplied()

    def unapplied(self) -> Iterator[tuple[m.Stage, tuple[Any, ...]]]:
        """What is staged and not decided on, for a log, or for a new copy, in tensors of its own: what is on its way
        may be decided on meanwhile, and updates are made where the gradient lies.

        Of a push of which some ranks' parts have not come: all that is there, as one of those that have, and nothing
        as the others.
        """
        pieces = self.held.pieces()
        for key, staged in self.staged.items():
            first, *others = sorted(staged.parts)
            copied = self.held.total([staged.gradient])
            yield m.Stage(key, first, staged.of, pieces, True), self.held.cut(copied, pieces)
            for part in others:
                yield m.Stage(key, part, staged.of, (), True), ()

    def _stage(self, message: m.Stage, tensors: Sequence[Any], now: float) -> None:
        if self._over(message.key):
            return
        new = self._put(message, tensors)
        if not message.forwarded:
            forward = m.Stage(message.key, message.part, message.parts, message.pieces, True, message.encoded)
            self._out += [Send(Address("shard", self.number, copy), forward, tuple(tensors)) for copy in self.others]
        staged = self.staged[message.key]
        if new and self.logged:
            self._out.append(Write(message, tuple(tensors), durable=staged.squares is not None))
        self._say_staged(message.key, staged, now)

    def _put(self, message: m.Stage, tensors: Sequence[Any]) -> bool:
        """False if this part was there. JobError for pieces that are not held here; then nothing has been entered."""
        staged = self.staged.get(message.key)
        if staged is None:
            staged = _Staged(self.held.blank(), message.parts)
        if message.part in staged.parts:
            return False
        self.held.put(staged.gradient, message.pieces, tensors, message.encoded)
        if message.key not in self.staged:
            # What the worker left half sent is of a push that was given up: none of it can have been committed.
            for key in [k for k, s in self.staged.items() if k.worker == message.key.worker and s.squares is None]:
                if key < message.key:
                    del self.staged[key]
            self.staged[message.key] = staged
        staged.parts.add(message.part)
        if len(staged.parts) == message.parts:
            staged.squares = self.held.squares(staged.gradient)
        return True

    def _say_staged(self, key: Key, staged: _Staged, now: float) -> None:
        if staged.squares is not None:
            staged.said = now
            self._out.append(Send(COORDINATOR, m.Staged(key, self.number, self.copy, staged.squares)))

    def _over(self, key: Key) -> bool:
        """A late double of a push that is in the weights, or of one before it."""
        return key.worker in self._applied and key <= self._applied[key.worker]

    def _combine(self, message: m.Combine) -> None:
        if message.version <= self.version:
            return
        self._combining = message
        if self._summed is None or self._summed[0] != message.keys:
            if not self._whole(message.keys):
                return
            total = self.held.total([self.staged[key].gradient for key in message.keys])
            self._summed = message.keys, total, self.held.squares(total)
        keys, _, squares = self._summed
        self._out.append(Send(COORDINATOR, m.Combined(message.version, keys, self.number, self.copy, squares)))

    def _apply(self, message: Apply) -> None:
        if message.version > self.version:
            self._orders[message.version] = message
        else:
            for key in message.keys:
                self.staged.pop(key, None)
        while (order := self._orders.get(self.version + 1)) is not None and self._whole(order.keys):
            self._apply_next(self._orders.pop(order.version))
            # The next order may be there already, and what they want would be gone.
            self._out += self.pulls.waited(self.version, readers=True)
            if self._keep():
                # Or the next one would be in it, too. The coordinator says again what is left.
                break
        self._out.append(Send(COORDINATOR, m.Applied(self.number, self.copy, self.version)))
        self._out += self.pulls.waited(self.version)

    def _whole(self, keys: Sequence[Key]) -> bool:
        """All of their bytes are here. They always are, but in a copy that has just recovered they may come later."""
        return all(key in self.staged and self.staged[key].squares is not None for key in keys)

    def _apply_next(self, order: Apply) -> None:
        self._backup |= dict.fromkeys(order.holders, self.pulls.passing(self.version, bool(order.holders)))
        staged = [self.staged.pop(key).gradient for key in order.keys]
        if len(staged) == 1:
            total = staged[0]
        elif self._summed is not None and self._summed[0] == order.keys:
            total = self._summed[1]
        else:
            total = self.held.total(staged)
        pulled = self._backup.pop(order.keys[0].worker, None) if self.backups else None
        assert pulled is not None or not (self.backups and order.staleness), "nothing to measure a stale gradient from"
        self.held.apply(total, order, pulled)
        self._summed = None
        for key in order.keys:
            self._applied[key.worker] = key
        self.version = order.version

    def _keep(self) -> bool:
        """Whether something is to be saved of this version; of one that is over, nothing can be any more."""
        values = self._saves.get(self.version)
        if values is not None:
            self._out.append(Keep(self.version, values))
        self._saves = {version: told for version, told in self._saves.items() if version > self.version}
        return values is not None

    def clone(self, copy: int) -> ServerShard:
        """Another copy with the same weights, optimizer state and staged pushes, none of it shared."""
        other = deepcopy(self)
        other.copy, other.others, other._out = copy, (), []
        other.pulls.cloned(copy)
        return other
