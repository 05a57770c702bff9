"""What workers may begin: who need not wait for others, on which samples, and who is told that it is over."""

from __future__ import annotations

from collections.abc import Callable

from shoal.sync.server.acts import Acts
from shoal.sync.server.decisions import check_clock
from shoal.sync.server.members import Member
from shoal.sync.server.messages import NOTHING, Finished
from shoal.sync.server.records import Begun, Granted
from shoal.sync.server.standing import Standing


def grant(acts: Acts, rate: Callable[[int], float]) -> None:
    """Lets whoever asks and may begin, and lets those go that are to begin nothing more. rate: as in `Coordinator`."""
    at = acts.at
    _dismiss(acts, rate)
    if at.over:
        _begin_rests(acts)
        return
    if at.rules.mode == "bsp":
        for member in [each for each in at.members.values() if each.asked and each.grant]:
            # One of the round that goes on could not pull: the others wait for it, not it for them.
            _give(acts, member)
        _begin(acts, may_begin(at))
        return
    for member in may_begin(at):
        if at.turn in (None, member.worker) or not member.starved:
            _give(acts, member)
    if at.samples.dry and not any(member.grant for member in at.members.values()):
        # While there is no text, nobody is getting nearer to whom ssp holds back.
        for member in [each for each in at.members.values() if each.asked and each.asked.leaves]:
            _give(acts, member)


def may_begin(at: Standing) -> list[Member]:
    """Of the workers that ask to begin a clock those that need not wait for others.

    bsp: everybody, in the order of numbers, once everybody has asked. ssp: those that are at most `staleness` clocks
    ahead of the slowest (Ho et al. 2013, section 3).
    """
    members = at.members.values()
    asked = [member for member in members if member.asked is not None]
    if not asked or not at.started:
        return []
    if at.rules.mode == "bsp":
        together = len(asked) == len(members) and not any(member.grant for member in asked)
        return sorted(asked, key=lambda member: member.worker) if together else []
    if at.rules.mode == "ssp":
        slowest = min(member.clock for member in members)
        return [member for member in asked if member.clock - slowest <= at.rules.staleness]
    return asked


def _dismiss(acts: Acts, rate: Callable[[int], float]) -> None:
    """Lets those go that are to compute nothing more and owe nothing, or for nothing: at a rate of 0, with which
    schedules end, a rest moves no weight."""
    at = acts.at
    for member in list(at.members.values()):
        asked, over = member.asked, at.over
        owes = asked is not None and asked.owes and not (over and rate(at.samples.used) == 0)
        if asked is not None and not owes and (over or asked.leaves):
            acts.say(member.address, Finished(member.worker, member.incarnation))
            member.asked, member.dismissed = None, True


def _begin_rests(acts: Acts) -> None:
    """There is nothing more to compute: whoever owes something pushes that."""
    if grants := _rests(acts.at):
        acts.write(Begun(grants))
    for granted in grants:
        _say_grant(acts, acts.at.members[granted.key.worker])


def _rests(at: Standing) -> tuple[Granted, ...]:
    """When there is nothing more to compute: what workers owe, pushed by all of them at a time.

    Not before all that take part have asked: nobody computes any more, so gradients meet nothing on their way that the
    mode does not promise, and with bsp and quorum all rests are one update.
    """
    members = sorted((o for o in at.members.values() if not o.dismissed), key=lambda member: member.worker)
    if any(member.asked is None for member in members):
        return ()
    return tuple(
        Granted(member.key, at.version, NOTHING, len(members) - 1, member.asked.gone)
        for member in members if member.asked is not None
    )  # fmt: skip


def _begin(acts: Acts, asked: list[Member]) -> None:
    """bsp: all begin together, and get their samples in the order of their numbers."""
    if grants := _leases(acts.at, asked):
        acts.write(Begun(grants))
    for member in asked:
        _say_grant(acts, member)


def _leases(at: Standing, members: list[Member]) -> tuple[Granted, ...]:
    """What each may begin with, in this order, without taking it: for those for whom there are samples.

    None, but what it owes, for one that leaves.
    """
    found = []
    for member in members:
        leaves = member.asked is not None and member.asked.leaves
        samples = NOTHING if leaves else at.samples.lease(member.size * at.rules.micro_batch)
        if samples is not None:
            found.append(Granted(member.key, at.version, samples, len(at.members) - 1))
    for granted in found:
        at.samples.give_back(granted.samples)
    return tuple(found)


def _give(acts: Acts, member: Member) -> None:
    """asp, ssp, quorum: a lease that is forgotten in a crash costs work, no more, so it need not be on disk.

    But for dc: of whom nobody knows that he computes on these weights, they are not kept.
    """
    assert member.asked is not None
    at, gone = acts.at, member.asked.gone
    samples = member.grant.samples if member.grant is not None else None
    if member.asked.leaves:
        samples = NOTHING
    elif samples is None and (samples := at.samples.lease(member.size * at.rules.micro_batch)) is not None:
        at.samples.give_back(samples)
    if samples is not None:
        if not member.asked.leaves:
            check_clock(at, member)
        durable = at.rules.compensation == "dc"
        acts.write(Granted(member.key, at.version, samples, len(at.members) - 1, gone), durable)
    _say_grant(acts, member)


def _say_grant(acts: Acts, member: Member) -> None:
    """Where there are no samples for it, but others' may yet come back, it waits."""
    if member.grant is not None:
        acts.say(member.address, member.grant)
