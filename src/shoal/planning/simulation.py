"""A run of a layout at any scale, step by step: ranks that are not equally fast, failures, and what is done again.

An actor is a rank of a pipeline with all ranks that share its blocks (tensor, context): these wait for each other in
every block, so they are as fast as the slowest of them. Pipelines (replicas × fsdp) wait for each other at the end of
every step, because clipping needs the norm of the whole gradient. So a step is the longest path through each pipeline's
schedule (`timeline`), the longest of all pipelines, and what comes after: max and plus, no events in a queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np

from shoal.errors import JobError
from shoal.job.check import at_least, positive, require
from shoal.planning import schedules, timeline
from shoal.planning.timeline import Seconds, Timeline
from shoal.planning.work import Array

# Cases of a schedule that are computed at once: (operations, cases) stays in a few dozen MB.
_CELLS = 4_000_000
MOST = 10_000_000
"""Actors times steps that are simulated, or steps alone where all take equally long."""
# Failures within one restart, after which no run is taken to get on.
_HOPELESS = 1000


@dataclass(frozen=True)
class Scene:
    """What runs. ranks, chunks: of a pipeline, and stages on each. taken: seconds of a micro-batch in each stage,
    (stages,), on a device of the usual speed. message: seconds of one between stages, or of one over each of the
    boundaries between two. pipelines: replicas × fsdp.
    devices: of an actor. exchange, optimizer: seconds of a step when the last pipeline is done, of gradients that are
    still on their way, and of the update.

    spread, jitter: standard deviation of the logarithm of a device's seconds: between devices, the same in all steps;
    and from step to step. slow: (pipeline, rank) -> so many times as long as usual, e.g. a machine that is throttled.
    """

    schedule: str
    ranks: int
    chunks: int
    micro_batches: int
    taken: Seconds
    message: float | tuple[float, ...] = 0.0
    pipelines: int = 1
    devices: int = 1
    exchange: float = 0.0
    optimizer: float = 0.0
    spread: float = 0.0
    jitter: float = 0.0
    slow: Mapping[tuple[int, int], float] = field(default_factory=dict)

    @property
    def actors(self) -> int:
        return self.pipelines * self.ranks

    @property
    def sent(self) -> Array:
        """Seconds of a message as `timeline` takes them."""
        return np.atleast_2d(self.message) if isinstance(self.message, tuple) else np.atleast_1d(self.message)

    @property
    def after(self) -> float:
        return self.exchange + self.optimizer

    def validate(self) -> None:
        """JobError. (What a schedule cannot run, `timeline` says.)"""
        for name in ("ranks", "chunks", "micro_batches", "pipelines", "devices"):
            at_least(name, getattr(self, name), 1)
        for name in ("exchange", "optimizer", "spread", "jitter"):
            at_least(name, getattr(self, name), 0)
        for seconds in self.sent.flat:
            at_least("message", float(seconds), 0)
        for (pipeline, rank), times in self.slow.items():
            there = 0 <= pipeline < self.pipelines and 0 <= rank < self.ranks
            what = f"there is no rank {rank} of pipeline {pipeline} that could be slow"
            require(there, what, f"pipelines 0 to {self.pipelines - 1}, each with ranks 0 to {self.ranks - 1}")
            positive(f"slow of rank {rank} of pipeline {pipeline}", times)


@dataclass(frozen=True)
class Failures:
    """mtbf: seconds between two failures of any device of the run, in the mean, at random (exponential); None = none
    fails. restart:
    seconds from a failure until the first step after it begins. every, stall: steps between two checkpoints, and
    seconds for which each holds the run up. After a failure the run goes on from the last one."""

    mtbf: float | None = None
    restart: float = 0.0
    every: int = 0
    stall: float = 0.0

    def validate(self) -> None:
        if self.mtbf is not None:
            positive("mtbf", self.mtbf)
        at_least("restart", self.restart, 0)
        at_least("every", self.every, 0)
        at_least("stall", self.stall, 0)


class Failure(NamedTuple):
    """at: seconds from the start. step: that was computed. lost: seconds of work that is done again."""

    at: float
    step: int
    lost: float


@dataclass(frozen=True)
class Outcome:
    """seconds: of the whole run. parts: what of it went where, they add up to it. steps: seconds of each one when it
    was done at last, (steps,). failures: in their order."""

    seconds: float
    parts: Mapping[str, float]
    steps: Array
    failures: tuple[Failure, ...]

    @property
    def goodput(self) -> float:
        """Share of the time that the same steps would take on equal devices without failures and checkpoints."""
        return min(1.0, self.parts["work"] / self.seconds)  # sums of the same seconds in another order


def run(scene: Scene, steps: int, failures: Failures | None = None, seed: int = 0) -> Outcome:
    """JobError for what cannot be simulated, LayoutError for a schedule that cannot run so. A run whose devices fail
    more often than it gets from one checkpoint to the next is given up, with a JobError, after 100 times as many
    steps as asked for; one that does not get through a restart, after 1,000 failures in it."""
    failures = failures or Failures()
    scene.validate()
    failures.validate()
    at_least("steps", steps, 1)
    drawn = scene.actors if scene.jitter else 1
    what = f"{steps} steps of {scene.actors} actors are too many to simulate"
    require(drawn * steps <= MOST, what, f"{max(1, MOST // drawn)} steps or less")
    usual = usual_seconds(scene)
    draws = np.random.default_rng((seed, 1))
    taken, counted = _steps(scene, seed), _Count(failures, draws)
    done = np.zeros(steps)
    while counted.step < steps:
        if counted.tries >= 100 * steps:
            raise _never(failures, usual)
        counted.take(next(taken), done, last=counted.step + 1 == steps)
    parts = {
        "work": usual * steps, "stragglers": float(done.sum()) - usual * steps, "checkpoints": counted.stalled,
        "again": counted.again, "restarts": counted.restarted,
    }  # fmt: skip
    return Outcome(counted.now, parts, done, tuple(counted.failures))


def _never(failures: Failures, usual: float) -> JobError:
    what = f"a failure each {failures.mtbf:.3g} s leaves no time for {failures.every or 'all'} steps of {usual:.3g} s"
    return JobError(what, fix="checkpoints more often, or fewer devices")


def usual_seconds(scene: Scene) -> float:
    """Of a step on equal devices of the usual speed."""
    return float(_pipelines(scene, np.ones((1, scene.ranks)))[0]) + scene.after


def of_groups(scene: Scene, groups: int, steps: int, seed: int = 0) -> Array:
    """Seconds of each group of pipelines that wait for each other, (steps, groups); (1, groups) where all steps take
    equally long. Each pipeline belongs to one, in their order."""
    scene.validate()
    counted = steps if scene.jitter else 1
    what = f"{counted} steps of {scene.actors} actors are too many to simulate"
    require(scene.actors * counted <= MOST, what, f"{max(1, MOST // scene.actors)} steps or less")
    each = (np.concatenate(list(_blocks(scene, speeds))) for speeds in _factors(scene, seed))
    taken = np.stack([next(each).reshape(groups, -1).max(axis=1) for _ in range(counted)])
    return taken + scene.after


class Picture(NamedTuple):
    """step: of some pipelines, a case each. longest: seconds until the last of all is done with it."""

    step: Timeline
    longest: float


def picture(scene: Scene, seed: int = 0, pipelines: int | None = None) -> Picture:
    """The first step as `run` simulates it with this seed, of the first pipelines; None = of all."""
    scene.validate()
    speeds = next(_factors(scene, seed))
    step = timeline.simulate(*_shape(scene), _at(scene, speeds[:pipelines]), scene.sent)
    return Picture(step, _longest(scene, speeds))


class _Count:
    """The clock of a run, and what has gone into it."""

    def __init__(self, failures: Failures, draws: np.random.Generator):
        self._of, self._draws = failures, draws
        self.now = self.again = self.restarted = self.stalled = 0.0
        self.step = self.tries = 0
        self.failures: list[Failure] = []
        self._saved, self._since = 0, 0.0
        self._next = self._drawn()

    def _drawn(self) -> float:
        return np.inf if self._of.mtbf is None else self.now + float(self._draws.exponential(self._of.mtbf))

    def take(self, seconds: float, done: Array, last: bool) -> None:
        """One more step, with the checkpoint after it; or as far as it gets before a device fails."""
        self.tries += 1
        saves = bool(self._of.every) and (self.step + 1) % self._of.every == 0 and not last
        stall = self._of.stall if saves else 0.0
        if self._next < self.now + seconds + stall:
            self._fail()
            return
        self.now += seconds + stall
        self.stalled += stall
        done[self.step] = seconds
        self.step += 1
        if saves:
            self._saved, self._since = self.step, self.now

    def _fail(self) -> None:
        """All since the last checkpoint is lost; so is a restart in which a device fails."""
        lost = self._next - self._since
        self.failures.append(Failure(self._next, self.step, lost))
        self.again += lost
        self.now, self.step = self._next, self._saved
        for failed in count():
            ready, self._next = self.now + self._of.restart, self._drawn()
            if self._next >= ready:
                break
            if failed == _HOPELESS:
                what = f"a failure each {self._of.mtbf:.3g} s leaves no time for a restart of {self._of.restart:.3g} s"
                raise JobError(what, fix="a faster restart, or fewer devices")
            self.failures.append(Failure(self._next, self.step, 0.0))
            self.restarted += self._next - self.now
            self.now = self._next
        self.restarted += self._of.restart
        self.now = self._since = ready


def _steps(scene: Scene, seed: int) -> Iterator[float]:
    """Seconds of one step after the other, without end."""
    for speeds in _factors(scene, seed):
        seconds = _longest(scene, speeds) + scene.after
        yield seconds
        while not scene.jitter:
            yield seconds


def _longest(scene: Scene, speeds: Array) -> float:
    """Of all pipelines."""
    return max(float(part.max()) for part in _blocks(scene, speeds))


def _blocks(scene: Scene, speeds: Array) -> Iterator[Array]:
    """Seconds of all pipelines, some at a time where they are many."""
    operations = 4 * scene.micro_batches * scene.ranks * scene.chunks
    each = max(1, _CELLS // operations)
    return (_pipelines(scene, speeds[first : first + each]) for first in range(0, len(speeds), each))


def _factors(scene: Scene, seed: int) -> Iterator[Array]:
    """Of each step, how many times as long as usual each actor takes, (pipelines, ranks)."""
    shape = (scene.pipelines, scene.ranks)
    draws, times = np.random.default_rng((seed, 0)), np.ones(shape)
    for at, slower in scene.slow.items():
        times[at] = slower
    lasting = draws.normal(0, scene.spread, (*shape, scene.devices)) if scene.spread else np.zeros((*shape, 1))
    while True:
        logs = lasting
        if scene.jitter:
            logs = lasting + draws.normal(0, scene.jitter, (*shape, scene.devices))
        yield times * np.exp(logs.max(axis=-1))


def _pipelines(scene: Scene, speeds: Array) -> Array:
    """Seconds of each pipeline's schedule. speeds: (n, ranks) times as long as usual."""
    if scene.ranks == 1:
        each = sum(np.sum(part) for part in scene.taken)
        return np.asarray(scene.micro_batches * each * speeds[:, 0], dtype=np.float64)
    return timeline.simulate(*_shape(scene), _at(scene, speeds), scene.sent).seconds


def _shape(scene: Scene) -> tuple[str, int, int, int]:
    return scene.schedule, scene.ranks, scene.chunks, scene.micro_batches


def _at(scene: Scene, speeds: Array) -> Seconds:
    """Of each stage, at its rank's speed, (n, stages)."""
    at = speeds[:, list(schedules.home(scene.schedule, scene.ranks, scene.chunks))]
    return Seconds(*(np.asarray(part, dtype=np.float64) * at for part in scene.taken))
