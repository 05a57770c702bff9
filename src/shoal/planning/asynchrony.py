"""Asynchronous workers of a parameter server, event by event: what they wait for, and how old their gradients are.

A worker computes, pushes through the servers' links, is applied by them, and pulls. Links and memory of the servers do
one thing at a time, in the order in which it comes. With a bound on staleness (Ho et al. 2013, "SSP") a worker that is
too far ahead of the slowest pulls when it no longer is. One that fails loses what it was computing; the others go on.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from shoal.planning.work import Array

# What a worker does next. The first three go through what is shared: links there, memory, links back.
_PUSH, _UPDATE, _PULL, _COMPUTE, _APPLIED, _RETURN = range(6)


class Shared(NamedTuple):
    """Seconds for which a push and a pull hold the servers' links and memory; of the worker's own link, where that is
    longer; and of what the worker does for them by itself."""

    there: float
    update: float
    back: float
    own_there: float = 0.0
    own_back: float = 0.0
    coded: float = 0.0


@dataclass(frozen=True)
class Crew:
    """computing: seconds of each worker's cycles, (cycles, workers): those of a cycle come again after the last. ahead:
    pushes by which one may be ahead of the slowest; None = any. mtbf: seconds between failures of a worker, in the
    mean; None = none fails. restart: seconds until it pulls again."""

    computing: Array
    shared: Shared
    ahead: int | None = None
    mtbf: float | None = None
    restart: float = 0.0


@dataclass(frozen=True)
class Run:
    """seconds: until the last of the updates. staleness: updates between a pull and the push after it -> how many.
    shares: of the workers' time: `computing`, `servers` (on the way and in queues), `ahead` (waiting for the slowest),
    `failures` (computed in vain, and down). updates: of each worker. failures: how many."""

    seconds: float
    staleness: Mapping[int, int]
    shares: Mapping[str, float]
    updates: Array
    failures: int

    @property
    def mean_staleness(self) -> float:
        return sum(age * many for age, many in self.staleness.items()) / max(1, sum(self.staleness.values()))


def run(crew: Crew, updates: int, seed: int = 0) -> Run:
    """Until so many updates have been applied."""
    return _Run(crew, np.random.default_rng((seed, 2))).until(updates)


class _Run:
    def __init__(self, crew: Crew, draws: np.random.Generator):
        self._crew, self._draws = crew, draws
        workers = crew.computing.shape[1]
        self._free = [0.0, 0.0, 0.0]
        self._order: Iterator[int] = count()
        self._events: list[tuple[float, int, int, int]] = []
        self._pushed, self._pulled, self._begun = [0] * workers, [0] * workers, [0] * workers
        # Pushes as the bound counts them: one that comes back counts on from the slowest.
        self._clock = [0] * workers
        self._down: set[int] = set()
        # Who is too far ahead, and since when.
        self._ahead: dict[int, float] = {}
        self._since = [0.0] * workers
        self._fails = [self._drawn(0.0) for _ in range(workers)]
        self._spent = dict.fromkeys(("computing", "servers", "ahead", "failures"), 0.0)
        self._ages: Counter[int] = Counter()
        self._version = self._failed = 0
        for worker in range(workers):
            self._put(0.0, _COMPUTE, worker)

    def until(self, updates: int) -> Run:
        does = (self._push, self._update, self._pull, self._compute, self._applied, self._return)
        now = 0.0
        while self._version < updates:
            now, _, what, worker = heapq.heappop(self._events)
            does[what](now, worker)
        total = sum(self._spent.values())
        shares = {name: spent / total if total else 0.0 for name, spent in self._spent.items()}
        return Run(now, dict(sorted(self._ages.items())), shares, np.array(self._pushed), self._failed)

    def _drawn(self, now: float) -> float:
        return np.inf if self._crew.mtbf is None else now + float(self._draws.exponential(self._crew.mtbf))

    def _put(self, at: float, what: int, worker: int) -> None:
        heapq.heappush(self._events, (at, next(self._order), what, worker))

    def _through(self, now: float, stage: int, held: float, own: float = 0.0) -> float:
        """When it is through. held: seconds in which nobody else can be."""
        start = max(now, self._free[stage])
        self._free[stage] = start + held
        return start + max(held, own)

    def _compute(self, now: float, worker: int) -> None:
        self._spent["servers"] += now - self._since[worker]
        cycles = self._crew.computing
        taken = float(cycles[self._begun[worker] % len(cycles), worker]) + self._crew.shared.coded
        self._begun[worker] += 1
        if self._fails[worker] < now + taken:
            self._fail(now, max(now, self._fails[worker]), worker)
            return
        self._spent["computing"] += taken
        self._since[worker] = now + taken
        self._put(now + taken, _PUSH, worker)

    def _fail(self, began: float, now: float, worker: int) -> None:
        """It leaves the slowest that others wait for. now: at which it fails, of what it began to compute."""
        ready = now + self._crew.restart
        self._failed += 1
        self._spent["failures"] += ready - began
        self._down.add(worker)
        self._put(ready, _RETURN, worker)
        self._let_go(now)

    def _return(self, now: float, worker: int) -> None:
        self._down.discard(worker)
        others = (clock for n, clock in enumerate(self._clock) if n not in self._down and n != worker)
        self._clock[worker] = min(others, default=self._clock[worker])
        self._fails[worker], self._since[worker] = self._drawn(now), now
        self._put(now, _PULL, worker)

    def _push(self, now: float, worker: int) -> None:
        shared = self._crew.shared
        self._put(self._through(now, _PUSH, shared.there, shared.own_there), _UPDATE, worker)

    def _update(self, now: float, worker: int) -> None:
        self._put(self._through(now, _UPDATE, self._crew.shared.update), _APPLIED, worker)

    def _applied(self, now: float, worker: int) -> None:
        """What it was computed on is as old as the updates since."""
        self._ages[self._version - self._pulled[worker]] += 1
        self._version += 1
        self._pushed[worker] += 1
        self._clock[worker] += 1
        self._pull(now, worker)
        self._let_go(now)

    def _pull(self, now: float, worker: int) -> None:
        """Or waits for the slowest."""
        if self._crew.ahead is not None and self._clock[worker] - self._slowest() > self._crew.ahead:
            self._spent["servers"] += now - self._since[worker]
            self._ahead[worker] = now
            return
        self._pulled[worker] = self._version
        shared = self._crew.shared
        self._put(self._through(now, _PULL, shared.back, shared.own_back), _COMPUTE, worker)

    def _slowest(self) -> int:
        return min((clock for n, clock in enumerate(self._clock) if n not in self._down), default=0)

    def _let_go(self, now: float) -> None:
        """Those that are no longer too far ahead."""
        if not self._ahead:
            return
        slowest = self._slowest()
        for worker in [n for n in self._ahead if self._clock[n] - slowest <= (self._crew.ahead or 0)]:
            since = self._ahead.pop(worker)
            self._spent["ahead"] += max(0.0, now - since)
            self._since[worker] = max(now, since)
            self._put(self._since[worker], _PULL, worker)
