"""What a simulated run came to: how fast, how stale, how much in vain, how good."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, replace

import torch

from shoal.errors import JobError
from shoal.job.optim import OptimOptions
from shoal.sync.server.messages import COORDINATOR, NOTHING
from shoal.sync.server.records import Committed, Left
from shoal.sync.server.rules import Rules
from shoal.sync.simulate.problem import LeastSquares
from shoal.sync.simulate.scenario import Scenario
from shoal.sync.simulate.world import World

_HEAD = "{:<28}{:>9}{:>9}{:>11}{:>12}{:>10}{:>12}{:>12}"


@dataclass(frozen=True)
class Outcome:
    """One mode. Seconds are simulated ones."""

    mode: str
    seconds: float
    """To the last commit."""
    updates: int
    updates_per_second: float
    samples_per_second: float
    wait: list[float]
    """Of each worker, from when it joined: the share of the time between its push and the beginning of its next
    gradient."""
    staleness_mean: float
    """Commits between pull and commit, over the accepted pushes."""
    staleness_max: int
    staleness: dict[int, int]
    """Pushes by staleness."""
    bound: int | None
    """What the mode promises, while no worker comes or goes."""
    rejected: int
    wasted: float
    """Rejected gradients, as a share of those computed."""
    given_up: int
    """Incarnations of workers that were lost, hung or killed."""
    loss: float
    """Over all samples, at the end."""
    loss_first: float


@dataclass(frozen=True)
class Simulation:
    """A mode and, on the same machines, network and data, bsp; beside bsp itself, where somebody was killed, bsp
    without that. `str()` of it is the table that people see."""

    outcome: Outcome
    bsp: Outcome
    speedup: float
    """Seconds of bsp by seconds of the mode, for the same samples."""

    def __str__(self) -> str:
        beside = "bsp, nobody killed" if self.outcome.mode == "bsp" else "bsp"
        rows = [(self.outcome.mode, self.outcome), *([] if self.bsp is self.outcome else [(beside, self.bsp)])]
        lines = [_HEAD.format("", "seconds", "updates", "updates/s", "staleness", "max", "rejected", "loss")]
        for name, row in rows:
            rejected = f"{row.rejected} ({row.wasted:.0%})"
            lines.append(_HEAD.format(
                name, f"{row.seconds:.1f}", row.updates, f"{row.updates_per_second:.3f}",
                f"{row.staleness_mean:.2f}", row.staleness_max, rejected, f"{row.loss:.5f}",
            ))  # fmt: skip
        for name, row in rows:
            waits = "  ".join(f"{number}: {share:.0%}" for number, share in enumerate(row.wait))
            lines += ["", f"{name}: wait of each worker  {waits}"]
            counts = "  ".join(f"{late}: {count}" for late, count in row.staleness.items())
            lines.append(f"{name}: pushes by staleness  {counts}")
        if self.outcome.bound is not None:
            unless = ", but for workers that come or go" if self.outcome.given_up else ""
            lines += ["", f"staleness is never above {self.outcome.bound}{unless}"]
        if len(rows) > 1:
            lines.append(f"{self.speedup:.2f} times as fast as {beside} over the same samples")
        return "\n".join(lines)


def simulate(scenario: Scenario, options: OptimOptions, global_batch: int) -> Simulation:
    """Trains least squares in the scenario, and again in bsp, with the same faults; if it is bsp, without them.

    global_batch: samples of all workers' whole gradients together. Raises JobError where it does not end.
    """
    outcome = _run(scenario, options, global_batch)
    rules = replace(scenario.rules, mode="bsp", max_staleness=None, compensation="none", strength=None)
    bsp = outcome
    if scenario.rules != rules or scenario.faults:
        faults = () if scenario.rules == rules else scenario.faults
        bsp = _run(replace(scenario, rules=rules, faults=faults), options, global_batch)
    return Simulation(outcome, bsp, bsp.seconds / outcome.seconds)


def _run(scenario: Scenario, options: OptimOptions, global_batch: int) -> Outcome:
    steps = -(-scenario.samples // global_batch)
    problem = LeastSquares(scenario.rules, options, scenario.shards, steps, global_batch, scenario.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        world = World(scenario, problem).run()
    finally:
        torch.set_num_threads(threads)
    if world.over:
        raise JobError(
            f"after {world.now:.0f} simulated seconds {world.over}: the job cannot go on",
            where=f"mode {scenario.rules.mode}", fix="fewer kills of one shard at a time, or more copies",
        )  # fmt: skip
    if not world.finished:
        raise JobError(
            f"after {world.now:.0f} simulated seconds the job has not ended", where=f"mode {scenario.rules.mode}",
            fix="fewer updates, less loss of messages, shorter --delay, or a longer --patience",
        )  # fmt: skip
    return _outcome(world, problem)


def _outcome(world: World, problem: LeastSquares) -> Outcome:
    rules, scenario = world.rules, world.scenario
    commits = [record for record in world.journal.history if isinstance(record, Committed)]
    late = [
        staleness
        for record in commits
        for staleness, samples in zip(record.staleness, record.samples, strict=True)
        if samples != NOTHING
    ]
    seconds, starts = world.committed[-1], scenario.starts or (0.0,) * len(world.seen)
    computed = sum(seen.computed for seen in world.seen)
    rejected = sum(seen.wasted for seen in world.seen)
    firsts = world.hosts[COORDINATOR].machine.at.copies.primaries()
    shards = [shard for shard in world.shards() if shard.copy == firsts[shard.number]]
    return Outcome(
        mode=_name(rules),
        seconds=seconds,
        updates=len(commits),
        updates_per_second=len(commits) / seconds,
        samples_per_second=scenario.samples / seconds,
        wait=[s.idle / max(s.idle, seconds - start, 1e-9) for s, start in zip(world.seen, starts, strict=True)],
        staleness_mean=statistics.fmean(late),
        staleness_max=max(late),
        staleness=dict(sorted(Counter(late).items())),
        bound=rules.bound(len(scenario.speeds) - 1),
        rejected=rejected,
        wasted=rejected / computed,
        given_up=sum(isinstance(record, Left) and record.why != "left" for record in world.journal.history),
        loss=problem.loss(shards),
        loss_first=problem.loss_of(problem.values),
    )


def _name(rules: Rules) -> str:
    """The mode with its options."""
    detail = {"ssp": f"({rules.staleness})", "quorum": f"({rules.quorum}, {rules.grace:g} s)"}.get(rules.mode, "")
    compensated = "" if rules.compensation == "none" else f" {rules.compensation}"
    encoded = "" if rules.codec == "none" else f" {rules.codec}"
    return rules.mode + detail + compensated + encoded
