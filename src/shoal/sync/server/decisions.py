"""What the coordinator decides, as functions of where it stands: who may join, which pushes count, what a commit is."""

from __future__ import annotations

import math
from collections.abc import Callable

from shoal.sync.server.members import Member
from shoal.sync.server.messages import Join, Key, Push, Refused, Square
from shoal.sync.server.records import Committed
from shoal.sync.server.staleness import rate_factor, weight_factor
from shoal.sync.server.standing import Standing


def refusal(message: Join, model: str, tokenizer: str) -> Refused | None:
    """Why this worker cannot take part in a job with these hashes, if it cannot."""
    fix = "join from the run's own folder, or from a copy of it in which nothing was changed"
    for what, theirs, ours in (("model", message.model, model), ("tokenizer", message.tokenizer, tokenizer)):
        if theirs != ours:
            why = f"worker {message.worker} has another {what}: {theirs or 'none'} instead of {ours or 'none'}"
            return Refused(message.nonce, why, fix)
    if message.share < 1:
        why = f"worker {message.worker} computes {message.share} micro-batches a gradient"
        return Refused(message.nonce, why, "at least one")
    return None


def as_granted(at: Standing, member: Member, push: Push) -> bool:
    """It is of samples that are leased for it, from the first one on or not, and of a version that there is.

    A rest is what was asked for, and it alone.
    """
    assert member.grant is not None
    start, stop = member.grant.samples
    samples_fit = start <= push.samples.start < push.samples.stop <= stop
    rests_fit = push.rest and member.grant.rest
    return (samples_fit or rests_fit) and member.grant.version <= push.version <= at.version


def commit(at: Standing, rate: Callable[[int], float], pushes: tuple[Push, ...], squares: list[Square]) -> Committed:
    """The next version: these pushes, their mean over all tokens clipped as a whole.

    squares: of their sum, in the order in which they are to be added up.
    """
    rules, keys = at.rules, tuple(push.key for push in pushes)
    staleness = tuple(how_late(at, push) for push in pushes)
    _check_bounds(at, pushes, staleness)
    # A rest weighs as the gradients with which it arrives; where there are none, as those from which it is left.
    alone = all(push.rest for push in pushes)
    weights = tuple(push.weight if alone or not push.rest else 0.0 for push in pushes)
    norm = math.sqrt(sum(square.value for square in squares)) / sum(weights)
    clip = min(1.0, rules.clip / norm) if rules.clip and norm else 1.0
    clip *= weight_factor(rules, max(staleness))
    lr = rate(at.samples.used) * rate_factor(rules, max(staleness))
    samples = tuple(push.samples for push in pushes)
    holders = _holders(at, keys) if rules.compensation == "dc" else ()
    losses = tuple(push.loss_sum for push in pushes)
    return Committed(at.version + 1, keys, staleness, weights, samples, norm, clip, lr, holders, losses)


def how_late(at: Standing, push: Push) -> int:
    """Staleness: commits since the pull. A rest is of many gradients, each of which was in time: it counts as 0."""
    return 0 if push.rest else at.version - push.version


def _check_bounds(at: Standing, pushes: tuple[Push, ...], staleness: tuple[int, ...]) -> None:
    """That the mode keeps what it promises. In a round, a worker that was given up meanwhile may have its part.

    Rests at the end of a job come from all at a time, whatever clocks they are at.
    """
    for push, late in zip(pushes, staleness, strict=True):
        member = at.members.get(push.key.worker)
        if member is None or member.key != push.key:
            bound = at.rules.bound(0)
        else:
            bound = at.rules.bound(member.peers)
            if not push.rest:
                check_clock(at, member)
        assert bound is None or late <= bound, f"{push.key} is {late} commits late, more than {bound}"


def check_clock(at: Standing, member: Member) -> None:
    """That with ssp nobody is more than `staleness` clocks ahead of the slowest, when it begins one and at its commit:
    the slowest is never slower than it was, since whoever joins begins where it is."""
    if at.rules.mode == "ssp":
        ahead = member.clock - min(other.clock for other in at.members.values())
        assert ahead <= at.rules.staleness, f"{member.key} is {ahead} clocks ahead, more than {at.rules.staleness}"


def _holders(at: Standing, keys: tuple[Key, ...]) -> tuple[int, ...]:
    """Workers that compute on the latest version, and will push when there are later ones."""
    return tuple(
        member.worker for member in at.members.values()
        if member.grant is not None and member.grant.version == at.version and member.key not in keys
    )  # fmt: skip
