"""A round: gradients of the same version that become one update together (`bsp`, `quorum`)."""

from __future__ import annotations

from shoal.sync.server.copies import Copy
from shoal.sync.server.messages import Key, Push, Square
from shoal.sync.server.rules import Rules
from shoal.sync.server.standing import Standing


class Round:
    """pushes, keys: what it consists of, in the order of workers; empty while it is open.

    squares: of their sum, by copy. ends: when an open round closes for late ones; None = not known yet.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        self.pushes: tuple[Push, ...] = ()
        self.keys: tuple[Key, ...] = ()
        self.squares: dict[Copy, tuple[Square, ...]] = {}
        self.ends: float | None = None

    def closes(self, at: Standing) -> bool:
        """The gradients that are here make an update, and no other is waited for.

        bsp, and rests: all that began the round and live. quorum: `quorum` of them, then `grace` seconds (Chen et al.
        2016, "Revisiting Distributed Synchronous SGD", section 3, for backup workers whose late gradients are dropped);
        a rest of one that leaves is none of them.
        """
        here = len(at.ready)
        going = [member for member in at.members.values() if member.grant and member.grant.version == at.version]
        if not here or any(member.worker == at.turn and member.key not in at.ready for member in going):
            return False
        rests = bool(going) and all(member.grant is not None and member.grant.rest for member in going)
        if self.rules.mode == "bsp" or rests:
            return here == len(going)
        real = sum(member.push is not None and not member.push.rest for member in at.ready.values())
        if real < min(self.rules.quorum, sum(not member.leaving for member in at.members.values())):
            # Whoever made it a quorum may be lost: the grace begins anew with the next one.
            self.ends = None
            # At the end of the data there may be no work for so many.
            return here == len(going) and (at.draining or not at.samples.available)
        if self.ends is None:
            self.ends = at.now + self.rules.grace
        return here == len(at.members) or at.now >= self.ends

    def close(self, at: Standing) -> None:
        """From now on it is what it consists of."""
        chosen = sorted(at.ready.values(), key=lambda member: member.worker)
        self.pushes = tuple(member.push for member in chosen if member.push is not None)
        self.keys = tuple(push.key for push in self.pushes)
        self.ends = None
        if len(chosen) == 1:
            self.squares = dict(chosen[0].staged)
