"""Which copies of shards are there: those that say so, that are gone, and that take the place of others."""

from __future__ import annotations

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.acts import Acts
from shoal.sync.server.commits import Commits
from shoal.sync.server.copies import Copy
from shoal.sync.server.messages import Address


class Presence:
    """Changes the set of copies of a shard; pushes may be complete without one that is gone.

    unheard: copies that have not said yet that they are there.
    """

    def __init__(self, acts: Acts, commits: Commits, places: tuple[int, ...], until: float):
        """places: copies of each shard, at first. until: when those that have said nothing are given up."""
        self.acts, self.at, self.commits = acts, acts.at, commits
        self.unheard = set(self.at.copies.applied)
        self._until, self._places = until, places
        # Copies that were the last of a shard when their connection broke.
        self._ends: set[Copy] = set()
        # Shards without a copy that lives, and since when that is known.
        self._bare: dict[int, float] = {}

    def tick(self) -> None:
        """Gives up who has never said that it is there."""
        if self.at.now >= self._until:
            for copy in sorted(self.unheard):
                self.lost(copy)
            self.unheard.clear()

    def lost(self, lost: Copy) -> None:
        """The last copy of a shard is waited for: it comes back with its log, or one that has taken all from it."""
        shard, number = lost
        copies = self.at.copies.of_shard[shard]
        left = tuple(copy for copy in copies if copy != number)
        if not left:
            self._ends.add(lost)
        elif left != copies:
            self._change(shard, left)

    def replaced(self, shard: int, copy: int) -> None:
        """As in `Coordinator`."""
        if not 0 <= shard < len(self._places):
            return
        copies, places = self.at.copies.of_shard[shard], self._places[shard]
        gone = [other for other in copies if other < copy and (copy - other) % places == 0]
        for other in gone:
            self.lost((shard, other))
        if len(gone) == len(copies):
            self._bare.setdefault(shard, self.at.now)

    def bare(self, now: float) -> int | None:
        """As in `Coordinator`."""
        return next((shard for shard, since in self._bare.items() if now - since >= self.at.rules.retry), None)

    def hello(self, message: m.Hello) -> None:
        """One is there: of those that are known, or a new one, which takes the place of a last one that was lost."""
        copy, copies = (message.shard, message.copy), self.at.copies
        if not 0 <= message.shard < len(copies.of_shard) or not copies.base <= message.version <= copies.version:
            why = (
                f"shard {message.shard} holds version {message.version}, its journal {copies.base} to {copies.version}"
            )
            self.acts.say(Address("shard", *copy), m.Refused(message.version, why, "start all from one checkpoint"))
            return
        self.unheard.discard(copy)
        self._ends.discard(copy)
        if copy not in copies.applied:
            left = [other for other in copies.of_shard[message.shard] if (message.shard, other) not in self._ends]
            self._change(message.shard, (*left, message.copy))
        self._bare.pop(message.shard, None)
        copies.applied[copy] = message.version
        self.acts.add(copies.again(copy, self.at.now))

    def _change(self, shard: int, copies: tuple[int, ...]) -> None:
        self.acts.write(r.Changed(shard, copies))
        self.acts.say_copies(shard)
        for member in list(self.at.members.values()):
            self.acts.say_primaries(member)
            self.commits.complete(member)
