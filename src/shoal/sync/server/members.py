"""The workers that take part: what each is at, and until when it is believed to live."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.sync.server.messages import Address, Answer, Ask, Grant, Key, Push, Square
from shoal.sync.server.records import Entered


@dataclass
class Member:
    """One incarnation of one worker.

    clock: its pushes that were answered. size: micro-batches of its next gradient, at most `share`.
    rejected: gradients rejected in a row for coming late. asked, grant, push: how far the current clock has come.
    staged: which copies of shards have all bytes of the push. answer: to the clock before.
    peers: other incarnations that have lived since the grant (before it: since the clock began), all of which may
    commit between the grant and its own commit.
    until: when it is given up unless it is heard of. broken: its connection is, since it was.
    dismissed: told that nothing is left to do, and owes nothing.
    """

    worker: int
    incarnation: int
    nonce: int
    share: int
    clock: int
    until: float
    size: int
    rejected: int = 0
    asked: Ask | None = None
    grant: Grant | None = None
    push: Push | None = None
    staged: dict[tuple[int, int], tuple[Square, ...]] = field(default_factory=dict)
    answer: Answer | None = None
    peers: int = 0
    broken: bool = False
    dismissed: bool = False

    @classmethod
    def of(cls, record: Entered, until: float) -> Member:
        return cls(
            record.worker, record.incarnation, record.nonce, record.share, record.clock, until, size=record.share
        )

    @property
    def key(self) -> Key:
        return Key(self.worker, self.incarnation, self.clock)

    @property
    def leaving(self) -> bool:
        """It computes nothing more."""
        return self.dismissed or (self.grant is not None and self.grant.rest)

    @property
    def address(self) -> Address:
        return Address("worker", self.worker, self.nonce)

    def answered(self, answer: Answer, peers: int) -> None:
        """The current clock is over. peers: others that live."""
        self.clock += 1
        self.peers = peers
        self.asked = self.grant = self.push = None
        self.staged = {}
        self.answer = answer
        if answer.accepted:
            self.rejected = 0
            self.size = min(self.share, self.size + 1)

    def came_late(self) -> None:
        """Half the micro-batches after two rejections, so that it is faster; one more after each accepted gradient."""
        self.rejected += 1
        if self.rejected == 2:
            self.size = max(1, self.size // 2)

    def heard(self, until: float) -> None:
        """It lives."""
        self.until, self.broken = until, False

    @property
    def starved(self) -> bool:
        """What it asks for is to come with a turn."""
        return self.starved_by(self.asked.gone if self.asked is not None else 0)

    def starved_by(self, gone: int) -> bool:
        """Smaller gradients did not help, or no pull came through (gone: of the Ask): it gets a turn."""
        return self.rejected > 2 or gone > 2
