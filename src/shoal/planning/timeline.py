"""When each rank of a pipeline computes what: the longest path through its schedule, for many cases at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.planning import schedules
from shoal.planning.schedules import BACKWARD, FORWARD, INPUT, WEIGHT, Operation, Order
from shoal.planning.work import Array, Flags

Index = npt.NDArray[np.intp]


class Seconds(NamedTuple):
    """Of a micro-batch in each stage, (stages,) or (n, stages) for n cases: forward, gradient of what the stage took,
    gradient of its weights."""

    forward: Array
    backward: Array
    weight: Array


class Event(NamedTuple):
    """start, end: seconds from the first operation of all. kind: as in `schedules`."""

    rank: int
    kind: int
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class _Graph:
    """Operations, in levels: each needs only what is in levels before its own. (o,) for o operations."""

    rank: Index
    kind: Index
    stage: Index
    micro_batch: Index
    before: Index
    """Which comes before on the rank; o where none does."""
    needs: Index
    """Whose result it takes; o where nobody's."""
    crosses: Flags
    """Whether that comes from another rank."""
    sends: Flags
    """Whether what comes before on the rank sends its result to another one."""
    comes: Index
    """Over which boundary what it takes comes: 0 between the first two stages."""
    goes: Index
    """Over which what comes before on the rank sends its result."""
    levels: tuple[int, ...]
    """Where each begins; and o."""


@dataclass(frozen=True)
class Timeline:
    """n cases of a schedule."""

    graph: _Graph
    start: Array
    """(o, n) seconds of each operation; end likewise."""
    end: Array

    @property
    def seconds(self) -> Array:
        """Until the last operation has ended, (n,)."""
        longest: Array = self.end.max(axis=0)
        return longest

    @property
    def busy(self) -> Array:
        """Seconds that each rank computes, (n, ranks)."""
        ranks = int(self.graph.rank.max()) + 1
        taken = self.end - self.start
        return np.stack([taken[self.graph.rank == rank].sum(axis=0) for rank in range(ranks)], axis=-1)

    @property
    def bubble(self) -> Array:
        """Share of the ranks' time in which they do not compute, (n,)."""
        share: Array = 1 - self.busy.mean(axis=-1) / self.seconds
        return share

    def events(self, case: int = 0) -> Iterator[Event]:
        """By rank, and of a rank in order."""
        g = self.graph
        starts, ends = self.start[:, case], self.end[:, case]
        for i in np.lexsort((np.arange(len(g.rank)), g.rank)):
            what = int(g.rank[i]), int(g.kind[i]), int(g.stage[i]), int(g.micro_batch[i])
            yield Event(*what, float(starts[i]), float(ends[i]))


def simulate(
    schedule: str,
    ranks: int,
    chunks: int,
    micro_batches: int,
    taken: Seconds,
    message: Array | float = 0.0,
    waits: bool = False,
) -> Timeline:
    """message: seconds from the end of an operation until another rank has its result, of all cases or (n,); or of each
    boundary between two stages, (n, stages - 1). waits: whether the sender computes nothing meanwhile.

    Raises LayoutError where the schedule cannot run so many chunks or micro-batches.
    """
    graph = _graph(schedule, ranks, chunks, micro_batches)
    count, taken_ON = len(graph.rank), _taken(graph, taken)
    late_ON = graph.crosses[:, None] * _over(graph.comes, message)
    held_ON = graph.sends[:, None] * _over(graph.goes, message) if waits else None
    (cases,) = np.broadcast_shapes(taken_ON.shape[1:], late_ON.shape[1:])
    start, end = np.zeros((count, cases)), np.zeros((count + 1, cases))
    for first, last in zip(graph.levels, graph.levels[1:], strict=False):
        free = end[graph.before[first:last]]
        if held_ON is not None:
            free = free + held_ON[first:last]
        np.maximum(free, end[graph.needs[first:last]] + late_ON[first:last], out=start[first:last])
        np.add(start[first:last], taken_ON[first:last], out=end[first:last])
    return Timeline(graph, start, end[:-1])


def seconds(
    schedule: str,
    ranks: int,
    chunks: int,
    micro_batches: int,
    taken: Seconds,
    message: Array | float = 0.0,
    waits: bool = False,
) -> Array:
    """As `simulate(...).seconds`, from at most three micro-batches a rank: each more is taken to add as much as the
    last ones did, and no less than the busiest rank computes. Exact with equal stages and no messages; within 2 % with
    stages of up to twice each other's cost and messages of up to a third of a stage's forward, drawn at random.
    """
    less = 3 * ranks
    # The rounds of an interleaved schedule have other lengths where they do not come out even.
    uneven = schedule in ("interleaved", "interleaved_zero_bubble") and micro_batches % ranks
    if micro_batches <= less or uneven:
        return simulate(schedule, ranks, chunks, micro_batches, taken, message, waits).seconds
    few, more = (simulate(schedule, ranks, chunks, m, taken, message, waits).seconds for m in (less - ranks, less))
    home = np.array(schedules.home(schedule, ranks, chunks))
    each = np.atleast_2d(sum(np.asarray(part, dtype=np.float64) for part in taken))
    busiest = np.max([each[:, home == rank].sum(axis=-1) for rank in range(ranks)], axis=0)
    found: Array = more + (micro_batches - less) * np.maximum((more - few) / ranks, busiest)
    return found


def _over(boundary: Index, message: Array | float) -> Array:
    """Of each operation in each case, (o, n) or (1, n)."""
    message = np.atleast_1d(np.asarray(message, dtype=np.float64))
    return message[None] if message.ndim == 1 else message.T[np.clip(boundary, 0, message.shape[1] - 1)]


def _taken(graph: _Graph, seconds: Seconds) -> Array:
    """Of each operation in each case, (o, n)."""
    forward, backward, weight = (np.atleast_2d(np.asarray(part, dtype=np.float64)) for part in seconds)
    forward, backward, weight = np.broadcast_arrays(forward, backward, weight)
    kinds = {FORWARD: forward, BACKWARD: backward + weight, INPUT: backward, WEIGHT: weight}
    table = np.stack([kinds[kind].T for kind in range(len(kinds))])
    taken: Array = table[graph.kind, graph.stage]
    return taken


@lru_cache(maxsize=64)
def _graph(schedule: str, ranks: int, chunks: int, micro_batches: int) -> _Graph:
    placed = _placed(schedules.orders(schedule, ranks, chunks, micro_batches), ranks * chunks)
    # One before the other on a rank is in a level before its; in the order of levels each rank's order is kept.
    placed.sort(key=lambda one: (one.level, one.rank))
    home, none = schedules.home(schedule, ranks, chunks), len(placed)
    at = {one.operation: i for i, one in enumerate(placed)}
    before, latest = np.full(none, none), [none] * ranks
    for i, one in enumerate(placed):
        before[i], latest[one.rank] = latest[one.rank], i
    needs = np.array([none if one.source is None else at[one.source] for one in placed])
    crosses = np.array([one.source is not None and home[one.source.stage] != one.rank for one in placed])
    goes = np.zeros(none + 1, dtype=bool)
    goes[needs[crosses]] = True
    level = np.array([one.level for one in placed])
    begins = np.searchsorted(level, np.arange(level[-1] + 2))
    rank = np.array([one.rank for one in placed])
    kind, stage, micro_batch = np.array([one.operation for one in placed]).T
    forward = kind == FORWARD
    sent = np.append(stage - ~forward, 0)[before]
    levels = tuple(begins.tolist())
    return _Graph(
        rank, kind, stage, micro_batch, before, needs, crosses, goes[before], stage - forward, sent, levels
    )  # fmt: skip


class _Placed(NamedTuple):
    """source: whose result the operation takes."""

    level: int
    rank: int
    operation: Operation
    source: Operation | None


def _placed(orders: tuple[Order, ...], stages: int) -> list[_Placed]:
    """All operations, each as soon as what it needs and what comes before on its rank have been placed."""
    found: list[_Placed] = []
    levels: dict[Operation, int] = {}
    at, free = [0] * len(orders), [0] * len(orders)
    while len(found) < sum(map(len, orders)):
        already = len(found)
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                wanted = _sources(order[at[rank]], stages)
                source = next((one for one in wanted if one in levels), None)
                if wanted and source is None:
                    break
                level = max(free[rank], 0 if source is None else levels[source] + 1)
                levels[order[at[rank]]] = level
                found.append(_Placed(level, rank, order[at[rank]], source))
                at[rank], free[rank] = at[rank] + 1, level + 1
        assert len(found) > already, "each rank waits for another"
    return found


def _sources(one: Operation, stages: int) -> list[Operation]:
    """Whose result this operation takes, if any: of these the one that there is."""
    if one.kind == FORWARD and one.stage > 0:
        return [one._replace(stage=one.stage - 1)]
    if one.kind in (BACKWARD, INPUT) and one.stage < stages - 1:
        return [one._replace(stage=one.stage + 1, kind=kind) for kind in (BACKWARD, INPUT)]
    return []
