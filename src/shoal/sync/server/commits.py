"""What becomes of gradients that all shards have: commits, one a push or one a round, and rejections."""

from __future__ import annotations

import math
from collections.abc import Callable

from shoal.sync.server import messages as m
from shoal.sync.server import records as r
from shoal.sync.server.acts import Acts
from shoal.sync.server.copies import Copy
from shoal.sync.server.decisions import commit, how_late
from shoal.sync.server.members import Member
from shoal.sync.server.messages import Address, Push, Range, Square
from shoal.sync.server.rounds import Round
from shoal.sync.server.standing import Standing


class Commits:
    """Looks at every push that may be complete (`complete`), and decides on those that are (`decide`).

    round: where gradients are committed together, those of the next version.
    """

    def __init__(self, acts: Acts, rate: Callable[[int], float], due: Callable[[Standing], bytes | None]):
        """rate, due: as in `Coordinator`."""
        self.acts, self.at, self.rules = acts, acts.at, acts.at.rules
        self.rate, self.due = rate, due
        self.round = Round(self.rules)

    def late(self, push: Push) -> bool:
        """More than the job allows, or for a round that is over."""
        if self.rules.rounds:
            return push.version < self.at.version and push.key not in self.round.keys
        return self.rules.max_staleness is not None and how_late(self.at, push) > self.rules.max_staleness

    def complete(self, member: Member) -> None:
        """Once every copy of every shard has all of the push; at its commit that is looked at again."""
        push = member.push
        if push is None or member.key in self.at.ready or not self.at.copies.applied.keys() <= member.staged.keys():
            return
        if not math.isfinite(sum(square.value for square in self._squares(member.staged))):
            self.reject(member, "not finite", push.samples)
        elif not 0 < push.weight < math.inf:
            self.reject(member, "no valid tokens", push.samples)
        else:
            self.at.ready[member.key] = member

    def decide(self) -> None:
        """Commits what can be by now."""
        if self.rules.rounds:
            self._decide_round()
        else:
            self._decide_each()

    def combine(self) -> None:
        """Asks for the sum of a round's gradients where it is not known yet."""
        if self.round.pushes:
            told = m.Combine(self.at.version + 1, self.round.keys)
            unknown = self.at.copies.applied.keys() - self.round.squares.keys()
            for copy in sorted(unknown):
                self.acts.say(Address("shard", *copy), told)

    def reject(self, member: Member, reason: str, skipped: Range = m.NOTHING) -> None:
        assert member.push is not None
        version = self.at.version
        record = r.Rejected(member.key, version, version - member.push.version, reason, skipped)
        self.acts.write(record)
        self.acts.drop(record.key)
        self.acts.say(member.address, record.answer())

    def _decide_each(self) -> None:
        """asp, ssp: one commit a push."""
        for member in list(self.at.ready.values()):
            push = member.push
            assert push is not None
            if self.at.turn not in (None, member.worker):
                continue
            if self.late(push):
                self.reject(member, r.LATE)
            elif self.at.copies.holds(member.staged):
                self._commit((push,), self._squares(member.staged))

    def _decide_round(self) -> None:
        """bsp, quorum: one commit a round."""
        if not self.round.pushes and self.round.closes(self.at):
            self.round.close(self.at)
            self.combine()
        if not self.round.pushes or not self.at.copies.holds(self.round.squares):
            return
        self._commit(self.round.pushes, self._squares(self.round.squares))
        self.round = Round(self.rules)
        for member in list(self.at.members.values()):
            if member.push is not None and self.late(member.push):
                self.reject(member, r.LATE)

    def _squares(self, of_copies: dict[Copy, tuple[Square, ...]]) -> list[Square]:
        """Of the shards' first copies, in the order in which one process would add them up: by name and row."""
        primaries = enumerate(self.at.copies.primaries())
        return sorted(square for shard, copy in primaries for square in of_copies[shard, copy])

    def _commit(self, pushes: tuple[Push, ...], squares: list[Square]) -> None:
        """Journal first; shards and workers learn of it from the effects after it."""
        record = commit(self.at, self.rate, pushes, squares)
        self.acts.write(record)
        self.acts.add(self.at.copies.send(record, self.at.now))
        if (values := self.due(self.at)) is not None:
            self.acts.save(values)
        for i, key in enumerate(record.keys):
            member = self.at.members.get(key.worker)
            if member is not None and member.incarnation == key.incarnation:
                self.acts.say(member.address, record.answer(i))
