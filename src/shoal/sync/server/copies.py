"""The copies of the server shards: which live, what each has applied, what must be said to them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.sync.server.effects import Send
from shoal.sync.server.messages import Address, Key
from shoal.sync.server.records import Changed, Committed

Copy = tuple[int, int]

# Commits that are sent again at a time to a copy that is behind.
_WINDOW = 16


class Copies:
    """Tells every copy of every shard of every commit until it has applied it."""

    def __init__(self, counts: Sequence[int], version: int, retry: float, epoch: int = 0):
        """counts: copies of each shard, at first. version: that all of them have applied."""
        self.base = version
        self._least = [min(2, count) for count in counts]
        self.retry = retry
        self.commits: list[Committed] = []
        self._commit_of: dict[Key, Committed] = {}
        self.of_shard: list[tuple[int, ...]] = [tuple(range(count)) for count in counts]
        self.applied: dict[Copy, int] = {copy: version for copy in self._all()}
        self._said: dict[Copy, float] = dict.fromkeys(self.applied, float("-inf"))
        # The last version of what was sent again to a copy.
        self._again: dict[Copy, int] = {}
        self.epoch = epoch

    @property
    def version(self) -> int:
        return self.base + len(self.commits)

    @property
    def doubled(self) -> bool:
        """Every shard that has no log has two copies: what they have outlives the loss of any process."""
        return all(len(copies) >= least for copies, least in zip(self.of_shard, self._least, strict=True))

    def holds(self, squares: Mapping[Copy, Any]) -> bool:
        """Whether what these copies have said that they have can be committed: it is everywhere, and in two places."""
        return self.doubled and self.applied.keys() <= squares.keys()

    def primaries(self) -> tuple[int, ...]:
        """The copy of each shard that workers talk to."""
        return tuple(copies[0] for copies in self.of_shard)

    def addresses(self) -> list[Address]:
        return [Address("shard", *copy) for copy in self.applied]

    def add(self, record: Committed) -> None:
        """The next version."""
        self.commits.append(record)
        self._commit_of |= dict.fromkeys(record.keys, record)

    def commit_of(self, key: Key) -> Committed | None:
        """What the push is in, if some copy might still have to apply it, be it after a crash."""
        return self._commit_of.get(key)

    def change(self, record: Changed) -> None:
        """Another set of copies of one shard; what a new one has applied is known by its Hello."""
        self.of_shard[record.shard] = record.copies
        self.epoch += 1
        self.applied = {copy: self.applied.get(copy, self.base) for copy in self._all()}
        self._said = {copy: self._said.get(copy, float("-inf")) for copy in self.applied}

    def send(self, record: Committed, now: float) -> list[Send]:
        """The latest commit, to all."""
        for copy in self.applied:
            self._said[copy] = now
        told = record.apply()
        return [Send(address, told) for address in self.addresses()]

    def again(self, copy: Copy, now: float) -> list[Send]:
        """What this copy has not applied yet, from the lowest version on."""
        self._said[copy] = now
        first = self.applied[copy] - self.base
        self._again[copy] = min(self.applied[copy] + _WINDOW, self.version)
        return [Send(Address("shard", *copy), record.apply()) for record in self.commits[first : first + _WINDOW]]

    def next(self, copy: Copy, now: float) -> list[Send]:
        """To a copy that has applied all that was sent again, and is still behind: what comes after."""
        done = self.applied[copy]
        if done != self._again.get(copy) or done >= self.version:
            return []
        return self.again(copy, now)

    def tick(self, now: float) -> list[Send]:
        late = [c for c, v in self.applied.items() if v < self.version and now - self._said[c] >= self.retry]
        return [send for copy in late for send in self.again(copy, now)]

    def forget(self, version: int) -> None:
        """Every copy has `version` on disk: nobody needs to be told of it again."""
        count = max(0, min(version, *self.applied.values()) - self.base)
        self.base += count
        for record in self.commits[:count]:
            for key in record.keys:
                del self._commit_of[key]
        del self.commits[:count]

    def _all(self) -> list[Copy]:
        return [(shard, copy) for shard, copies in enumerate(self.of_shard) for copy in copies]
