"""Why a group of ranks failed: the one cause among the many errors that follow from it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from shoal import errors
from shoal.errors import RankError, ShoalError
from shoal.launch.messages import Failed
from shoal.operations import Doing

# What a user can do about it.
LESS_MEMORY = "a smaller micro_batch, recompute=block or fsdp in the layout, or a smaller model"
NO_MEMORY = "the kernel ran out of memory"

_OUTSIDE, _NATIVE = "someone else sent it: a user, or a batch system at its limit", "its stack is printed above"
_FIXES = {
    signal.SIGKILL: _OUTSIDE,
    signal.SIGABRT: "what its libraries said of it is above; where a size did not match, ranks are in other operations",
    signal.SIGSEGV: _NATIVE,
    signal.SIGBUS: _NATIVE,
    signal.SIGFPE: _NATIVE,
}


class Terminated(RankError):
    """A rank did what SIGTERM asks for: it ended, without an answer."""


@dataclass(frozen=True)
class Failure:
    """What one rank failed of. at: monotonic seconds. follows: probably only from another rank's failure.

    doing: what the rank was in, as far as it could say. said: the error says all, e.g. of a user's mistake.
    late: it has only not answered yet.
    """

    rank: int
    error: ShoalError
    at: float
    follows: bool
    doing: Doing | None = None
    said: bool = False
    late: bool = False

    @property
    def died(self) -> bool:
        """Whether its process was killed, or ended by itself, without a word."""
        return self.doing is None and not self.said


def raised(rank: int, failed: Failed, where: str = "") -> Failure:
    """The rank's entry raised: a ShoalError is raised again as it was, with the rank named (where: by another name)."""
    where = where or f"rank {rank}"
    error: ShoalError
    if failed.kind:
        kind = getattr(errors, failed.kind)
        error = kind(failed.what, where=f"{where}, {failed.where}" if failed.where else where, fix=failed.fix)
    else:
        error = RankError(f"failed\n{failed.what}", where=where)
    return Failure(rank, error, failed.at, failed.follows, failed.doing, said=bool(failed.kind))


def ended(rank: int, code: int, at: float, out_of_memory: bool, where: str = "") -> Failure:
    """The rank's process ended without an answer. out_of_memory: the kernel killed some process meanwhile."""
    where = where or f"rank {rank}"
    if code >= 0:
        error = RankError(f"ended with exit code {code} before it was done", where=where)
        return Failure(rank, error, at, False)
    if code == -signal.SIGTERM:
        return Failure(rank, Terminated("ended by SIGTERM", where=where), at, False, said=True)
    fix = _FIXES.get(signal.Signals(-code), "")
    if out_of_memory and code == -signal.SIGKILL:
        fix = f"{NO_MEMORY}: {LESS_MEMORY}"
    error = RankError(f"killed by {signal.Signals(-code).name}", where=where, fix=fix)
    # Backends abort their process when a peer is gone.
    return Failure(rank, error, at, code == -signal.SIGABRT)


def late(ranks: list[int], seconds: float, at: float) -> Failure:
    """The ranks did not answer in time."""
    names = ", ".join(str(rank) for rank in ranks)
    error = RankError(f"no answer within {seconds:g} s", where=f"rank{'s' * (len(ranks) > 1)} {names}")
    return Failure(ranks[0], error, at, False, late=True)


def root_cause(failures: list[Failure]) -> Failure:
    """The first failure that is not another's consequence; where all seem to be, the first death, or the first."""
    return min(failures, key=lambda failure: (failure.follows, not failure.died, failure.at))


def memory_kills() -> int:
    """Processes that the kernel has killed for want of memory since it booted."""
    counters = Path("/proc/vmstat")
    if not counters.exists():
        return 0
    lines = counters.read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
