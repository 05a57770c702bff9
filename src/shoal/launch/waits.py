"""Who waited for whom when a rank failed, and in which operation: from what all ranks say that they are in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from shoal.errors import RankError
from shoal.operations import Doing, Operation

# Operations into which all ranks give tensors of one size.
_ALIKE = ("all_reduce", "all_gather", "broadcast")


@dataclass(frozen=True)
class Wait:
    """`rank` is in `operation`, and those in `missing` have not entered it, as far as is known."""

    rank: int
    operation: Operation
    missing: frozenset[int]


def waits(doings: Mapping[int, Doing], lost: Collection[int] = ()) -> list[Wait]:
    """What the ranks that wait are held up by, if anything. lost: ranks to look for first, in what they wait for."""
    found = []
    for rank, doing in sorted(doings.items()):
        held_up = [Wait(rank, o, _missing(o, rank, doings)) for o in _held_in(doing)]
        held_up = [wait for wait in held_up if wait.missing]
        of_lost = [wait for wait in held_up if wait.missing & {*lost}]
        if rank not in lost and (of_lost or held_up):
            found.append((of_lost or held_up)[0])
    return found


def told(doings: Mapping[int, Doing], lost: int) -> str:
    """Lines that say in what others waited for the rank that was lost, or for each other. Empty if nobody did."""
    groups: dict[str, list[int]] = {}
    for wait in waits(doings, {lost}):
        whom = "it" if lost in wait.missing else names(wait.missing)
        groups.setdefault(f"waited for {whom} in {_said(wait.operation)}", []).append(wait.rank)
    return "".join(f"\n  {names(ranks)} {what}" for what, ranks in groups.items())


def alone(doing: Doing, rank: int) -> str:
    """`waited in all_reduce along fsdp at step 41 for rank 1`: what one rank knows by itself; empty if it did not."""
    for operation in _held_in(doing)[:1]:
        others = names({*operation.ranks} - {rank})
        return f"waited in {_said(operation)}{at_step({rank: doing})} for {others}"
    return ""


def at_step(doings: Mapping[int, Doing]) -> str:
    """` at step 41`: the furthest that somebody has begun, as nobody ends one alone; empty before the first."""
    step = max((doing.step for doing in doings.values()), default=0)
    return f" at step {step}" if step else ""


def unequal(doings: Mapping[int, Doing]) -> RankError | None:
    """Ranks that entered different operations where all must enter the same; None if there are none."""
    entered: dict[tuple[str, tuple[int, ...], int], dict[int, Operation]] = {}
    for rank, doing in sorted(doings.items()):
        for operation in doing.operations:
            if not operation.direct:
                entered.setdefault((operation.along, (*operation.ranks,), operation.number), {})[rank] = operation
    for (along, _, number), of_rank in sorted(entered.items(), key=lambda item: min(o.begun for o in item[1].values())):
        kinds: dict[str, list[int]] = {}
        for rank, operation in of_rank.items():
            kinds.setdefault(_signature(operation), []).append(rank)
        if len(kinds) > 1:
            odd = min(kinds, key=lambda kind: (len(kinds[kind]), -kinds[kind][0]))
            others = " and ".join(f"{names(ranks)} entered {kind}" for kind, ranks in kinds.items() if kind != odd)
            what = f"entered {odd}{at_step(doings)} as operation #{number} {_along(along)}, where {others}"
            fix = "all ranks must do the same: look for a condition, or data, that differs between them"
            return RankError(what, where=names(kinds[odd]), fix=fix)
    return None


def absent(doings: Mapping[int, Doing]) -> RankError | None:
    """The rank that others wait for and that waits for nobody; ranks that wait for each other; None if nobody waits."""
    held_up = waits(doings)
    stuck = {wait.rank for wait in held_up}
    for wait in held_up:
        if guilty := wait.missing - stuck:
            lost = min(guilty)
            entered = _said(_other_end(wait) if wait.operation.direct else wait.operation, number=True)
            what = f"never entered {entered}{at_step(doings)}{_last(doings.get(lost))}"
            return RankError(what + told(doings, lost), where=names([lost]), fix=_FIX)
    if held_up:
        lines = [
            f"\n  {names([w.rank])} waited for {names(w.missing)} in {_said(w.operation, number=True)}" for w in held_up
        ]
        return RankError("waited for each other" + "".join(lines), where=names(stuck), fix=_FIX)
    return None


_FIX = "its stack is printed above; if it was only slow, a longer sync.timeout"


def names(ranks: Collection[int]) -> str:
    """`rank 2`, `ranks 0, 1 and 3`."""
    *most, last = (str(rank) for rank in sorted(ranks))
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"


def _held_in(doing: Doing) -> list[Operation]:
    """Operations that may be what the rank waits in, the likeliest first."""
    if not doing.waits:
        return []
    alike = [operation for operation in doing.operations if operation.direct == doing.direct]
    under_way = [operation for operation in alike if operation.open]
    # Collectives are waited for in their order. Of one that failed nobody knows any more that it was under way.
    return alike[::-1] if doing.direct or not under_way else under_way


def _missing(operation: Operation, rank: int, doings: Mapping[int, Doing]) -> frozenset[int]:
    others = {*operation.ranks} - {rank}
    return frozenset(o for o in others if o not in doings or not _entered(operation, rank, doings[o]))


def _entered(operation: Operation, rank: int, other: Doing) -> bool:
    """Whether a rank that does `other` has entered an operation that `rank` is in."""
    if operation.direct:
        kind = "send" if operation.kind == "recv" else "recv"
        return any(o.kind == kind and o.ranks == [rank] and _same(o, operation) for o in other.operations)
    return any(o.ranks == operation.ranks and _same(o, operation) for o in other.operations)


def _same(one: Operation, other: Operation) -> bool:
    return one.along == other.along and one.number >= other.number and one.direct == other.direct


def _said(operation: Operation, number: bool = False) -> str:
    """number: whose, too."""
    numbered = f" #{operation.number}" if number else ""
    if operation.direct and number:
        numbered += f" {'from' if operation.kind == 'recv' else 'to'} rank {operation.ranks[0]}"
    return f"{operation.kind}{numbered} {_along(operation.along)}"


def _other_end(wait: Wait) -> Operation:
    kind = "send" if wait.operation.kind == "recv" else "recv"
    return replace(wait.operation, kind=kind, ranks=[wait.rank])


def _along(axes: str) -> str:
    return "among all ranks" if axes == "all ranks" else f"along {axes}"


def _signature(operation: Operation) -> str:
    of_all = operation.kind in _ALIKE
    return f"{operation.kind} of {operation.size:,} elements" if of_all else operation.kind


def _last(doing: Doing | None) -> str:
    if doing is None:
        return "; it does not answer"
    last = f"; it was last in {_said(doing.operations[-1], number=True)}" if doing.operations else ""
    return f"{last}{', now' if last else '; it is'} at {doing.at}" if doing.at else last
