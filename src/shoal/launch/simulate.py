"""`shoal simulate JOB`: the replicas of a job in this process, on simulated machines, beside all-reduce every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from shoal.data.prepare import Prepared, prepare
from shoal.errors import LayoutError
from shoal.job import Job
from shoal.job.check import require
from shoal.job.idle import without_idle
from shoal.job.shares import AUTO
from shoal.launch.cores import threads_per_rank
from shoal.launch.train import absolute_paths, architecture, vocabulary
from shoal.sync.rounds import Rounds
from shoal.training.settle import replace_train, uneven
from shoal.training.simulated import Machines, Outcome
from shoal.training.simulated import simulate as simulated

if TYPE_CHECKING:
    from shoal.job.layout import Layout

_HEAD = "{:<34}{:>11}{:>8}{:>12}{:>14}{:>10}{:>10}"


@dataclass(frozen=True)
class Simulation:
    """A sync and, on the same machines, network and data, all-reduce every step without a codec. `str()` of it is the
    table that people see."""

    outcome: Outcome
    allreduce: Outcome
    speedup: float
    """Seconds of all-reduce by seconds of the sync, for the same steps."""

    def __str__(self) -> str:
        rows = [self.outcome, self.allreduce] if self.outcome is not self.allreduce else [self.outcome]
        lines = [_HEAD.format("", "seconds", "steps", "tokens/s", "MB/replica", "loss", "val_loss")]
        for row in rows:
            sent, val = sum(row.sent_bytes) / len(row.sent_bytes) / 1e6, row.val_loss
            lines.append(_HEAD.format(
                row.sync, f"{row.seconds:.1f}", row.steps, f"{row.tokens_per_second:.1f}", f"{sent:.2f}",
                f"{row.losses[-1]:.4f}", "" if val is None else f"{val:.4f}",
            ))  # fmt: skip
        lines.append("")
        for row in rows:
            waits = "  ".join(f"{number}: {share:.0%}" for number, share in enumerate(row.wait))
            lines.append(f"{row.sync}: wait of each replica  {waits}")
        if len(rows) > 1:
            lines.append(f"{self.speedup:.2f} times as fast as allreduce over the same steps")
        return "\n".join(lines)


def simulate(job: Job, machines: Callable[[int], Machines], say: Callable[[str], None]) -> Simulation:
    """Trains the job twice, with its sync and with all-reduce every step.

    machines: of so many replicas. say: gets a sentence now and then. Raises ShoalError for the user's mistakes.
    """
    layout = _layout(job)
    where = machines(layout.replicas)
    job, corpus = _ready(job, where, say)
    if job.sync.name != "allreduce" and (alone := _alone(job)):
        say(alone)
    plain = without_idle(replace(job, sync=replace(job.sync, name="allreduce", codec="none")))
    before = torch.get_num_threads()
    torch.set_num_threads(threads_per_rank(job.run.threads, 1))
    try:
        outcome = simulated(job, corpus, where, say)
        allreduce = outcome if job.sync.name == "allreduce" and job.sync.codec == "none" else None
        allreduce = allreduce or simulated(plain, corpus, where, say)
    finally:
        torch.set_num_threads(before)
    return Simulation(outcome, allreduce, allreduce.seconds / outcome.seconds)


def _alone(job: Job) -> str:
    """A sentence where replicas that train apart exchange nothing before the run's last step is done."""
    sync, steps = job.sync, job.train.steps
    rounds = Rounds(sync.every, sync.fragments, sync.delay)
    # What leaves after a step is applied `delay` steps later. After the last step all come together anyway.
    if any(rounds.ends(step) for step in range(sync.together + sync.delay + 1, steps)) or sync.together >= steps:
        return ""
    since = f"after step {sync.together}, " if sync.together else ""
    return f"sync.every={sync.every} and {steps} steps: {since}replicas exchange nothing on the way, only at the end"


def _layout(job: Job) -> Layout:
    """The job's, of replicas that can be simulated. Else JobError."""
    require(
        job.sync.name != "server",
        "a parameter server is simulated on a problem of its own, not on a job",
        "leave out the recipe: shoal simulate --sync server",
    )
    layout = job.layout
    if layout is None or layout.replicas == 1:
        fix = "e.g. --layout replicas=4"
        raise LayoutError("there is nothing to simulate: the job names no layout of 2 replicas or more", fix=fix)
    if layout.ranks_per_replica > 1:
        raise LayoutError(
            f"layout {layout}: a simulated replica is one rank",
            fix=f"--layout replicas={layout.replicas}: within a replica, every layout computes the same",
        )
    require(
        job.train.steps > 0,
        "train.minutes are of a real clock, and time is simulated here",
        "give a number of steps, e.g. --steps 200",
    )
    require(job.sync.codec != "auto", "sync.codec=auto measures a real link", "name a codec, e.g. --codec int8")
    return layout


def _ready(job: Job, machines: Machines, say: Callable[[str], None]) -> tuple[Job, Prepared]:
    """Text prepared, and no `auto` left."""
    job = architecture(absolute_paths(job))
    corpus = prepare(job.data, say=say)
    job = vocabulary(job, corpus).validate()
    if job.train.precision == "auto":
        say("precision fp32: nothing is measured here")
        job = replace_train(job, precision="fp32")
    if job.train.compile == "on":
        say("compile off: a simulation computes uncompiled")
    job = replace_train(job, compile="off")
    assert job.layout is not None
    if AUTO in (job.layout.replica_share, job.sync.pace):
        job = uneven(job, list(machines.seconds), "simulated", say).validate()
    return job, corpus
