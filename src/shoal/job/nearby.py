"""Of a layout that a job cannot have, the nearest one that it can have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from math import log
from typing import Any, TypeVar

from shoal.errors import JobError
from shoal.job.layout import AXES, SCHEDULES, Layout

T = TypeVar("T")

# Of an axis, how far from the degree that was asked for all others are tried.
_REACH = 4


def or_nearest(asked: Layout, check: Callable[[Layout], T], *others: Callable[[Layout], object]) -> T:
    """What `check` makes of the layout. The JobError that it raises also names the nearest layout that passes it and
    all others."""
    try:
        return check(asked)
    except JobError as error:
        near = nearest_layout(asked, check, *others)
        fix = f"layout {near} would do" + (f"; or {error.fix}" if error.fix else "") if near else error.fix
        raise type(error)(error.what, where=error.where, fix=fix) from None


def nearest_layout(asked: Layout, *checks: Callable[[Layout], object]) -> Layout | None:
    """With one option changed, else with two, else with some of its axes alone and all else as by default; on as many
    ranks as were asked for, or on as few less as can be.

    checks: each raises JobError for what the job cannot have. None if not even one process can have it.
    """
    changes = list(_changes(asked))
    for number in (1, 2):
        tried = [
            replace(asked, **dict(several))
            for several in combinations(changes, number)
            if len({option for option, _ in several}) == number
        ]
        for layout in sorted((t for t in tried if t.world <= asked.world), key=lambda t: _distance(asked, t)):
            if _passes(layout, checks):
                return layout
    used = {axis: degree for axis in AXES if (degree := getattr(asked, axis)) > 1}
    kept = [Layout(**dict(axes)) for number in range(len(used)) for axes in combinations(used.items(), number)]
    return next((k for k in sorted(kept, key=lambda k: _distance(asked, k)) if _passes(k, checks)), None)


def of_world(asked: Layout, world: int, *checks: Callable[[Layout], object]) -> Layout | None:
    """On so many ranks: with one axis of another degree, replicas first; else the nearest where these are fewer.

    checks: as for `nearest_layout`. None if nothing near will do.
    """

    def as_many(layout: Layout) -> None:
        if layout.world != world:
            raise JobError(f"{layout.world} ranks")

    for axis in AXES:
        others = asked.world // getattr(asked, axis)
        layout = replace(asked, **{axis: world // others})
        if world % others == 0 and _passes(layout, checks):
            return layout
    return nearest_layout(asked, as_many, *checks)


def _changes(asked: Layout) -> Iterator[tuple[str, Any]]:
    """(option, another value)."""
    for axis in (*AXES, "expert"):
        degree = getattr(asked, axis)
        near = {1, 2, 4, 8, degree // 2, *range(max(1, degree - _REACH), degree + _REACH + 1)} - {degree}
        yield from product([axis], sorted(near) if degree > 1 else [2])
    options: dict[str, Sequence[Any]] = {
        "replica_share": [""], "micro_batch": [0, 1], "stages": [""], "context_by": ["ring"], "tensor_by": ["gather"],
        "zero": [3], "schedule": ["1f1b", *SCHEDULES], "recompute": ["none"],
    }  # fmt: skip
    for option, values in options.items():
        yield from product([option], [value for value in values if value != getattr(asked, option)])


def _distance(asked: Layout, other: Layout) -> tuple[float, ...]:
    """Ranks that stay idle first, then by how much axes grow or shrink."""
    moved = sum(abs(log(getattr(other, axis)) - log(getattr(asked, axis))) for axis in (*AXES, "expert"))
    return log(asked.world) - log(other.world), moved


def _passes(layout: Layout, checks: Iterable[Callable[[Layout], object]]) -> bool:
    try:
        layout.validate()
        for check in checks:
            check(layout)
    except JobError:
        return False
    return True
