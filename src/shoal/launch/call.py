"""One function called in all ranks of a group: the answers of all, or the one cause of a failure."""

from __future__ import annotations

import signal
import time
from collections.abc import Collection
from typing import Any

from shoal.errors import RankError
from shoal.launch import failure
from shoal.launch.failure import Failure
from shoal.launch.messages import Failed, Returned
from shoal.launch.ranks import Ranks

# Seconds in which others may name the cause, when the first failure seems to follow from one of theirs.
_CAUSE = 1.0
# Seconds between asking the others to stop and killing them.
_GRACE = 1.5


def call(
    ranks: Ranks,
    entry: str,
    args: dict[str, Any],
    world: int,
    *,
    threads: int = 0,
    timeout: float | None = None,
    lost: Collection[int] = (),
) -> list[Any]:
    """What `entry(seat, **args)` returned in ranks 0 … world - 1, in this order.

    entry: "package.module:function". args and values: anything that JSON can hold. threads: per rank; 0 = an
    equal part of the cores. timeout: seconds for everything, None = no limit. lost: ranks whose process is
    expected to die; their value is None and the others go on.
    If a rank raises, dies or is late, all are ended within seconds and the root cause is raised: the
    ShoalError that a rank raised, RankError for anything else.
    """
    try:
        ranks.send(entry, args, world, threads)
        return _Answers(ranks, world, timeout, lost).collect()
    except BaseException:
        ranks.stop()
        raise


class _Answers:
    def __init__(self, ranks: Ranks, world: int, timeout: float | None, lost: Collection[int]):
        self.ranks, self.world, self.timeout, self.lost = ranks, world, timeout, lost
        self.pending = set(range(world))
        self.values: dict[int, Any] = {}
        self.failures: list[Failure] = []
        self.memory_kills = failure.memory_kills()

    def collect(self) -> list[Any]:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while self.pending and not self.failures:
            self._listen(deadline)
            if self.pending and deadline is not None and time.monotonic() > deadline:
                self._late()
        if self.failures:
            self._hear_cause()
            cause = failure.root_cause(self.failures)
            self._end_others()
            raise cause.error
        return [self.values.get(rank) for rank in range(self.world)]

    def _listen(self, deadline: float | None) -> None:
        """Takes in what has happened, or waits for it until the deadline."""
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        for rank, message in self.ranks.events(wait):
            if rank not in self.pending:
                continue
            self.pending.discard(rank)
            if isinstance(message, Returned):
                self.values[rank] = message.value
            elif isinstance(message, Failed):
                self.failures.append(failure.raised(rank, message))
            elif rank not in self.lost:
                out_of_memory = failure.memory_kills() > self.memory_kills
                self.failures.append(failure.ended(rank, message.code, time.monotonic(), out_of_memory))
        if not self.ranks.has_store:
            raise RankError("the process that keeps the ranks' store was killed")

    def _late(self) -> None:
        assert self.timeout is not None
        # Each prints where it is.
        self.ranks.signal(signal.SIGUSR1, self.pending)
        self.failures.append(failure.late(sorted(self.pending), self.timeout, time.monotonic()))

    def _hear_cause(self) -> None:
        """Waits a little while all that is known follows from something that is not."""
        deadline = time.monotonic() + _CAUSE
        while self.pending and time.monotonic() < deadline and all(f.follows for f in self.failures):
            self._listen(deadline)

    def _end_others(self) -> None:
        """Asks them to end; whoever does not is killed by the caller. How they end is no failure any more."""
        self.ranks.signal(signal.SIGTERM, self.pending)
        deadline = time.monotonic() + _GRACE
        while self.pending and time.monotonic() < deadline:
            self._listen(deadline)
