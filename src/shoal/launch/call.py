"""One function called in all ranks of a group: the answers of all, or the one cause of a failure."""

from __future__ import annotations

import signal
import time
from collections.abc import Collection
from typing import Any

from shoal.errors import RankError, ShoalError
from shoal.launch import failure, waits
from shoal.launch.failure import Failure
from shoal.launch.messages import ASK, Failed, Returned
from shoal.launch.ranks import Ranks
from shoal.operations import Doing

# Seconds in which others may name the cause, when the first failure seems to follow from one of theirs, and in which
# they come to wait for whoever failed; and between two questions for it.
_CAUSE, _AGAIN = 1.0, 0.2
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
    ShoalError that a rank raised, RankError for anything else, which names the operation that the others waited in.
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
        self.doings: dict[int, Doing] = {}
        self.answered: set[int] = set()
        self.memory_kills = failure.memory_kills()

    def collect(self) -> list[Any]:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while self.pending and not self.failures:
            self._listen(deadline)
            if self.pending and deadline is not None and time.monotonic() > deadline:
                self._late()
        if self.failures:
            self._hear_others()
            error = self._explained(failure.root_cause(self.failures))
            self._end_others()
            raise error
        return [self.values.get(rank) for rank in range(self.world)]

    def _listen(self, deadline: float | None) -> None:
        """Takes in what has happened, or waits for it until the deadline."""
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        for rank, message in self.ranks.events(wait):
            if rank not in self.pending:
                continue
            if isinstance(message, Doing):
                self.doings[rank] = message
                self.answered.add(rank)
                continue
            self.pending.discard(rank)
            self.doings.pop(rank, None)
            if isinstance(message, Returned):
                self.values[rank] = message.value
            elif isinstance(message, Failed):
                self.failures.append(failure.raised(rank, message))
                if message.doing is not None:
                    self.doings[rank] = message.doing
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

    def _hear_others(self) -> None:
        """Waits a little while all that is known follows from something that is not, and until the others wait for
        whoever failed."""
        deadline = time.monotonic() + _CAUSE
        self._listen_until(min(deadline, time.monotonic() + _AGAIN))
        while self.pending and time.monotonic() < deadline:
            cause = failure.root_cause(self.failures)
            if cause.said:
                return
            self.answered.clear()
            self.ranks.signal(ASK, self.pending)
            self._listen_until(min(deadline, time.monotonic() + _AGAIN))
            if not cause.follows and all(rank in self.answered and self.doings[rank].waits for rank in self.pending):
                return

    def _listen_until(self, deadline: float) -> None:
        """Or until all pending ranks have said what they are in, or what they failed of."""
        while self.pending - self.answered and time.monotonic() < deadline:
            self._listen(deadline)

    def _explained(self, cause: Failure) -> ShoalError:
        """The error of the cause, with what is known of the operations that ranks were in."""
        if cause.said:
            return cause.error
        different = waits.unequal(self.doings)
        first, _, rest = cause.error.what.partition("\n")
        if cause.follows and not cause.died:
            found = different or waits.absent(self.doings)
            if found is None:
                return cause.error
            # Who is stuck prints where it is.
            self.ranks.signal(signal.SIGUSR1, self.pending)
            return found
        if cause.late:
            found = different or waits.absent(self.doings)
            more = f"\n  {found.where} {found.what}" if found else ""
        else:
            first += waits.at_step(self.doings)
            more = waits.told(self.doings, cause.rank)
            more += f"\n  {different.where} {different.what}" if different else ""
        what = f"{first}{more}" + (f"\n{rest}" if rest else "")
        return RankError(what, where=cause.error.where, fix=cause.error.fix)

    def _end_others(self) -> None:
        """Asks them to end; whoever does not is killed by the caller. How they end is no failure any more."""
        self.ranks.signal(signal.SIGTERM, self.pending)
        deadline = time.monotonic() + _GRACE
        while self.pending and time.monotonic() < deadline:
            self._listen(deadline)
