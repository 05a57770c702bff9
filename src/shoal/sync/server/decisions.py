"""What the coordinator decides, as functions of where it stands: the content of a commit, who may begin."""

from __future__ import annotations

import math
from collections.abc import Callable

from shoal.sync.server.members import Member
from shoal.sync.server.messages import Key, Push, Square
from shoal.sync.server.records import Committed
from shoal.sync.server.staleness import rate_factor, weight_factor
from shoal.sync.server.standing import Standing


def commit(at: Standing, rate: Callable[[int], float], pushes: tuple[Push, ...], squares: list[Square]) -> Committed:
    """The next version: these pushes, their mean over all tokens clipped as a whole.

    squares: of their sum, in the order in which they are to be added up.
    """
    rules, keys = at.rules, tuple(push.key for push in pushes)
    staleness = tuple(at.version - push.version for push in pushes)
    _check_bounds(at, keys, staleness)
    weights = tuple(push.weight for push in pushes)
    norm = math.sqrt(sum(square.value for square in squares)) / sum(weights)
    clip = min(1.0, rules.clip / norm) if rules.clip and norm else 1.0
    clip *= weight_factor(rules, max(staleness))
    lr = rate(at.samples.used) * rate_factor(rules, max(staleness))
    samples = tuple(push.samples for push in pushes)
    holders = _holders(at, keys) if rules.compensation == "dc" else ()
    return Committed(at.version + 1, keys, staleness, weights, samples, norm, clip, lr, holders)


def _check_bounds(at: Standing, keys: tuple[Key, ...], staleness: tuple[int, ...]) -> None:
    """That the mode keeps what it promises."""
    for key, late in zip(keys, staleness, strict=True):
        member = at.members.get(key.worker)
        bound = at.rules.bound(member.peers) if member is not None and member.key == key else None
        assert bound is None or late <= bound, f"{key} is {late} commits late, more than {bound}"


def _holders(at: Standing, keys: tuple[Key, ...]) -> tuple[int, ...]:
    """Workers that compute on the latest version, and will push when there are later ones."""
    return tuple(
        member.worker for member in at.members.values()
        if member.grant is not None and member.grant.version == at.version and member.key not in keys
    )  # fmt: skip


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
