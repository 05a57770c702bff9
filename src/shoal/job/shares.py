"""Where machines are uneven: how much of a step each replica computes, and which steps of its own it takes.

Both are lists like `3+1`, one number for each replica, of which only the proportions count.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING

from shoal.errors import LayoutError

if TYPE_CHECKING:
    from shoal.job.layout import Layout
    from shoal.job.sync import SyncOptions

AUTO = "auto"
"""What a list says until a run has measured its replicas."""

_DIGITS = 7  # as many as the largest number of a layout has


def flaw(text: str) -> str:
    """Why the text is no such list, empty where it is one."""
    parts = text.split("+")
    if not all(part.isascii() and part.isdecimal() and part.strip("0") for part in parts):
        return "is not a list of whole numbers above 0"
    return "has a number that is too large" if any(len(part) > _DIGITS for part in parts) else ""


def parse(text: str) -> tuple[int, ...]:
    """`6+2` -> (3, 1): the smallest whole numbers in this proportion. () for nothing and `auto`."""
    if text in ("", AUTO):
        return ()
    numbers = [int(part) for part in text.split("+")]
    return tuple(n // gcd(*numbers) for n in numbers)


def written(numbers: Sequence[int]) -> str:
    """(6, 2) -> `3+1`; empty where all are equal."""
    return "+".join(str(n // gcd(*numbers)) for n in numbers) if len(set(numbers)) > 1 else ""


def in_proportion(pieces: int, speeds: Sequence[float], least: int = 1) -> list[int]:
    """Whole numbers, `least` or more each and `pieces` together, so that the slowest is done as early as can be.

    Each piece goes to whoever would be done with it first, which makes the largest n / speed as small as whole numbers
    allow. (The apportionment of D'Hondt and Jefferson: Balinski and Young 1982, "Fair Representation".)
    """
    assert pieces >= least * len(speeds) > 0 < min(speeds)
    numbers = [least] * len(speeds)
    waiting = [((least + 1) / speed, i) for i, speed in enumerate(speeds)]
    heapq.heapify(waiting)
    for _ in range(pieces - least * len(speeds)):
        _, first = waiting[0]
        numbers[first] += 1
        heapq.heapreplace(waiting, ((numbers[first] + 1) / speeds[first], first))
    return numbers


def grain(layout: Layout) -> int:
    """Sequences by which a replica's part may grow: one more micro-batch on each of its ranks; with an interleaved
    schedule one more round of them."""
    rounds = layout.pipeline if layout.schedule in ("interleaved", "interleaved_zero_bubble") else 1
    return layout.fsdp * max(1, layout.micro_batch) * rounds


def sequences(layout: Layout, batch: int) -> tuple[int, ...]:
    """Of a global batch of so many, those of each replica. With `auto`, until it is measured, as even as can be."""
    if layout.replica_share == AUTO:
        size = grain(layout)
        return tuple(n * size for n in in_proportion(batch // size, [1.0] * layout.replicas))
    whole = sum(layout.shares)
    return tuple(batch * share // whole for share in layout.shares)


def rows(layout: Layout, batch: int, reader: int, taking: Sequence[int] | None = None) -> range:
    """Which sequences of a step this reader computes, counted from the step's first one.

    batch: of a step that all replicas take. taking: those that take this one, None = all.
    """
    replica, place = divmod(reader, layout.fsdp)
    if taking is not None and replica not in taking:
        return range(0)
    of_each = sequences(layout, batch)
    size = of_each[replica] // layout.fsdp
    first = sum(of_each[r] for r in range(replica) if taking is None or r in taking) + place * size
    return range(first, first + size)


def taking(sync: SyncOptions, replicas: int, step: int) -> list[int]:
    """Replicas that take this step (from 0), those that `sync.pace` makes leave some out spread over the run."""
    paces = parse(sync.pace)
    if not paces or step < sync.together:
        return list(range(replicas))
    fastest = max(paces)
    return [r for r, pace in enumerate(paces) if (step + 1) * pace // fastest > step * pace // fastest]


def samples(layout: Layout, sync: SyncOptions, batch: int, step: int) -> int:
    """Sequences that a step uses up. batch: of one that all replicas take."""
    of_each = sequences(layout, batch)
    return sum(of_each[r] for r in taking(sync, layout.replicas, step))


def often(sync: SyncOptions, replica: int) -> float:
    """Of the run's steps, the part that this replica takes."""
    paces = parse(sync.pace)
    return paces[replica] / max(paces) if paces else 1.0


def weights(layout: Layout, sync: SyncOptions) -> list[float]:
    """What each replica's learning counts in a mean, 1 on average: in proportion to the sequences it learns from."""
    paces = parse(sync.pace) or (1,) * layout.replicas
    given = [share * pace for share, pace in zip(layout.shares, paces, strict=True)]
    return [layout.replicas * n / sum(given) for n in given]


def check_list(option: str, text: str, replicas: int) -> None:
    """LayoutError where it is not a number for each replica (or `auto`, or nothing)."""
    if text in ("", AUTO):
        return
    if why := flaw(text):
        raise LayoutError(f"{option}={text[:60]!r} {why}", fix=f"a number for each replica, such as 3+1, or {AUTO}")
    if (named := len(text.split("+"))) != replicas:
        raise LayoutError(
            f"{option}={text[:60]} has {named} number{'s' * (named > 1)} for replicas={replicas}",
            fix=f"give {replicas}, such as {'+'.join(['1'] * min(replicas, 8))}, or {AUTO}",
        )
