"""A job of several roles, started by one command: a role that is lost is started again while the others go on."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import RankError, ShoalError
from shoal.launch import failure
from shoal.launch.elastic import is_mistake
from shoal.launch.failure import Failure, Terminated
from shoal.launch.local import Interrupted, Interrupts
from shoal.launch.messages import Ended, Failed, Returned
from shoal.launch.ranks import Ranks
from shoal.operations import Doing

# Seconds within which the losses of one role are counted, and that the others have when the leader has returned.
_WITHIN, _RETURN = 60.0, 10.0
# Seconds in which other ranks of a group may name the cause, when one has only lost its peers; and between asking
# everybody to stop and killing them.
_CAUSE, _GRACE = 1.0, 1.5
# Seconds between two times that it is asked whether the job is another one by now.
_LOOK = 1.0


class Superseded(Exception):
    """The job is another one by now; no process of its roles is left."""


@dataclass(frozen=True)
class Role:
    """One part of a job that can be lost and started again by itself.

    name: how users hear of it, e.g. `worker 2`. entry: "package.module:function", called in each of its ranks as
    `entry(seat, **args, life=n)`, where n is how often it was started before. args: anything that JSON can hold.
    ranks: processes that live and die together, a group with a rendezvous of its own in each life. first: of its ranks
    among all on this machine that use devices, and neighbours: how many of these there are (`Seat.local`,
    `Seat.neighbours`). threads: per rank.
    """

    name: str
    entry: str
    args: dict[str, Any]
    ranks: int = 1
    first: int = 0
    neighbours: int = 1
    threads: int = 1


def run(
    ranks: Ranks,
    roles: Sequence[Role],
    *,
    say: Callable[[str], None],
    on_signal: Callable[[str], None] | None = None,
    restarts: int = 5,
    superseded: Callable[[], bool] | None = None,
) -> Any:
    """Starts all roles, the first of which leads; returns what (rank 0 of) the leader returned.

    A role of which a process dies without an answer, or raises an error that only tells of a lost peer, is killed and
    started again; `say` is told so in a line. More than `restarts` losses of one role within a minute are a RankError
    that names it. Any other error in any role ends all and is raised, with its role (of groups: and rank) named: the
    ShoalError that it was, else RankError with the traceback. A role that has returned stays so. When the leader has,
    the others have 10 seconds to return; what fails then is only said.

    The first SIGINT or SIGTERM goes to the leader alone, as SIGTERM, and on_signal is called with its name; the second
    kills all. Interrupted then, and if the leader is lost after the first, for it would not know that it shall stop.
    superseded: asked every second whether the job is another one by now: all are killed then, and Superseded is raised;
    after a first signal Interrupted, for there is nothing left that the leader could finish.
    No process of the roles is left in any case. The store of `ranks`, and idle ranks of theirs, stay.
    """
    assert len({role.name for role in roles}) == len(roles), "users know roles by their names"
    ranks.start(0)
    first, groups = 1 + max(ranks.alive, default=-1), list[_Group]()
    for role in roles:
        groups.append(_Group(ranks, role, first))
        first += role.ranks
    job = _Job(ranks, groups, say, restarts, superseded)
    try:
        with Interrupts(ranks, on_signal, job.leader.numbers) as interrupts:
            try:
                return job.lead(interrupts)
            except ShoalError:
                job.end()
                raise
    finally:
        ranks.stop(job.group_of)


class _Group:
    """A role's processes, life after life, under the same numbers.

    pending: those without an answer. failures: of this life; a group that has any is lost, or ends the job.
    wait: until when, in monotonic seconds, its other ranks may name the cause.
    """

    def __init__(self, ranks: Ranks, role: Role, first: int):
        self.ranks, self.role, self.numbers = ranks, role, range(first, first + role.ranks)
        self.life = 0
        self.losses: deque[float] = deque()

    def start(self) -> None:
        role = self.role
        self.pending, self.failures, self.wait = {*self.numbers}, list[Failure](), math.inf
        self.value: Any = None
        self.memory_kills = failure.memory_kills()
        for rank, number in enumerate(self.numbers):
            # Without spaces: the kernel keeps 15 bytes.
            name = f"shoal-{role.name.replace(' ', '')}"
            self.ranks.fork(number, f"{name}.{rank}" if role.ranks > 1 else name)
        args = {**role.args, "life": self.life}
        self.ranks.ask(self.numbers, role.entry, args, role.threads, role.first, role.neighbours)

    @property
    def done(self) -> bool:
        """Whether all its ranks have returned."""
        return not self.pending and not self.failures

    def hear(self, number: int, message: Returned | Failed | Ended | Doing) -> Failure | None:
        """Takes in what one of its processes said, or that it ended. A failure that is more than a loss is returned."""
        if number not in self.pending or isinstance(message, Doing):
            return None
        self.pending.discard(number)
        rank = number - self.numbers.start
        if isinstance(message, Returned):
            if rank == 0:
                self.value = message.value
            return None
        where = f"{self.role.name}, rank {rank}" if self.role.ranks > 1 else self.role.name
        if isinstance(message, Failed):
            failed = failure.raised(rank, message, where)
        else:
            out_of_memory = failure.memory_kills() > self.memory_kills
            failed = failure.ended(rank, message.code, time.monotonic(), out_of_memory, where)
        # What a rank raises whose peer has died follows from that, recognised or not.
        known = any(not earlier.follows for earlier in self.failures)
        self.failures.append(failed)
        self.wait = min(self.wait, time.monotonic() + _CAUSE)
        more = isinstance(message, Failed) and (not failed.follows or is_mistake(failed.error))
        return failed if more and not known else None

    def lost(self) -> Failure | None:
        """The cause, if it is lost and all its processes are gone. Kills those that are left, when the cause is known
        or does not come."""
        if not self.failures:
            return None
        cause = failure.root_cause(self.failures)
        if self.pending and cause.follows and time.monotonic() < self.wait:
            return None
        self.pending, self.wait = set(), math.inf
        self.ranks.signal(signal.SIGKILL, self.numbers)
        return None if any(number in self.ranks.alive for number in self.numbers) else cause


class _Job:
    """All groups, the first of which leads."""

    def __init__(
        self, ranks: Ranks, groups: list[_Group], say: Callable[[str], None], restarts: int,
        superseded: Callable[[], bool] | None,
    ):  # fmt: skip
        self.ranks, self.groups, self.leader, self.say, self.restarts = ranks, groups, groups[0], say, restarts
        self._superseded, self._look = superseded, 0.0 if superseded else math.inf
        self.group_of = {number: group for group in groups for number in group.numbers}

    def lead(self, interrupts: Interrupts) -> Any:
        """What the leader returned, when the others have ended too or had their time."""
        for group in self.groups:
            group.start()
        while not self.leader.done:
            self._listen(self._look)
            self._check(interrupts)
            for group in self.groups:
                if cause := group.lost():
                    self._lost(group, cause, interrupts.first)
        self._let_return()
        return self.leader.value

    def _check(self, interrupts: Interrupts) -> None:
        """Raises Superseded where the job is another one by now."""
        if self._superseded is None or (now := time.monotonic()) < self._look:
            return
        self._look = now + _LOOK
        if self._superseded():
            # A signal may have come while it was asked.
            self.ranks.events(0)
            raise Interrupted(interrupts.first) if interrupts.first else Superseded

    def end(self) -> None:
        """Asks all to end; whoever does not is killed by the caller. How they end is no failure any more."""
        with contextlib.suppress(RankError):
            self.ranks.signal(signal.SIGTERM, self.group_of)
            self.ranks.dismiss(self.group_of)
            deadline = time.monotonic() + _GRACE
            while self.group_of.keys() & self.ranks.alive and time.monotonic() < deadline:
                self.ranks.events(deadline - time.monotonic())

    def _listen(self, deadline: float = math.inf) -> None:
        """Takes in what has happened, or waits for it until the deadline."""
        deadline = min(deadline, *(group.wait for group in self.groups))
        wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for number, message in self.ranks.events(wait):
            group = self.group_of.get(number)
            if group is None:
                continue
            failed = group.hear(number, message)
            if group.done:
                self.ranks.dismiss(group.numbers)
            if failed and self.leader.done:
                self.say(str(failed.error))
            elif failed:
                raise failed.error
        if not self.ranks.has_store:
            raise RankError("the process that keeps the ranks' store was killed")

    def _lost(self, group: _Group, cause: Failure, interrupted: str) -> None:
        """Starts it again, unless that is of no use."""
        if group is self.leader and interrupted:
            if not isinstance(cause.error, Terminated):
                self.say(f"{group.role.name} {_how(cause)}")
            raise Interrupted(interrupted)
        now = time.monotonic()
        group.losses.append(now)
        while group.losses[0] < now - _WITHIN:
            group.losses.popleft()
        if len(group.losses) > self.restarts:
            first, _, rest = cause.error.what.partition("\n")
            what = f"{first}; lost {len(group.losses)} times within {_WITHIN:g} s" + (f"\n{rest}" if rest else "")
            raise RankError(what, where=cause.error.where, fix=cause.error.fix)
        self.say(f"{group.role.name} {_how(cause)}: started again")
        group.life += 1
        group.start()

    def _let_return(self) -> None:
        """Gives the others time; whoever has returned then ends with its exit handlers."""
        deadline = time.monotonic() + _RETURN
        while (late := [group for group in self.groups if group.pending and not group.failures]) and (
            time.monotonic() < deadline
        ):
            self._listen(deadline)
        for group in late:
            self.say(f"{group.role.name} had not returned {_RETURN:g} s after {self.leader.role.name}: killed")
        self.ranks.hang_up([number for number, group in self.group_of.items() if group.done])


def _how(cause: Failure) -> str:
    """What happened to a role, behind its name: `was killed by SIGKILL`."""
    what = cause.error.what
    if cause.died or isinstance(cause.error, Terminated):
        memory = f" ({failure.NO_MEMORY})" if failure.NO_MEMORY in cause.error.fix else ""
        return f"was {what}{memory}" if what.startswith("killed") else what
    return f"lost a peer ({what.splitlines()[-1]})"
