"""A planned run of workers that do not wait for each other, simulated and told: updates, staleness, waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.observe.units import counted, duration, percent, short
from shoal.planning import asynchrony, goodput, show, simulation
from shoal.planning.asynchrony import Crew, Run
from shoal.planning.plan import Question, brief
from shoal.planning.scene import Staged

_NAMED = {
    "computing": "computing", "servers": "on the way, and in queues of the servers",
    "ahead": "waiting for the slowest (ssp)", "failures": "failed: lost, and restarts",
}  # fmt: skip


@dataclass(frozen=True)
class SimulatedWorkers:
    """steps: batches' worth of gradients; a worker has a share of each. mtbf: seconds between failures of any device;
    None = none fails."""

    question: Question
    staged: Staged
    steps: int
    seed: int
    mtbf: float | None
    run: Run

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, with all that went wrong."""
        return self.question.global_batch * self.question.sequence * self.steps / self.run.seconds

    @property
    def days(self) -> float | None:
        """To the token target, going on so. None without one."""
        tokens = self.question.tokens
        return None if tokens is None else goodput.days(tokens, self.tokens_per_second)


def simulate(question: Question, staged: Staged, steps: int, mtbf: float | None, seed: int) -> SimulatedWorkers:
    """mtbf: seconds between failures of any device; None = none fails. JobError for what cannot be simulated."""
    assert staged.shared is not None
    server, workers = question.server, staged.plan.layout.replicas
    own = server.local_steps
    computing = simulation.of_groups(staged.scene, workers, own * -(-steps // own), seed)
    computing = computing * own if len(computing) == 1 else computing.reshape(-1, own, workers).sum(axis=1)
    crew = Crew(
        computing, staged.shared, server.staleness if server.mode == "ssp" else None,
        None if mtbf is None else mtbf * workers, question.restart,
    )  # fmt: skip
    updates = max(1, round(steps * workers / own))
    return SimulatedWorkers(question, staged, steps, seed, mtbf, asynchrony.run(crew, updates, seed))


def text(found: SimulatedWorkers) -> str:
    """The whole answer."""
    run, scene, plan = found.run, found.staged.scene, found.staged.plan
    workers = len(run.updates)
    each = scene.pipelines // workers * scene.ranks * scene.devices
    step = run.seconds / found.steps
    lines = [
        show.title(found.question),
        f"{brief(plan.layout)}",
        f"{counted(found.steps, 'step')} of {counted(workers, 'worker')} of {counted(each, 'device')}, "
        f"seed {found.seed}: {counted(sum(run.staleness.values()), 'update')} in {duration(run.seconds)}",
        "",
        *_shares(run),
        "",
        f"a step, as many gradients as workers: {short(plan.seconds)} predicted of equal ones, here {short(step)}",
        f"staleness: {run.mean_staleness:.3g} updates between pull and push in the mean, "
        f"{max(run.staleness):,} at most",
        f"updates of a worker: {run.updates.min():,.0f} to {run.updates.max():,.0f}",
        _failing(found),
        f"tokens/s: {found.tokens_per_second:,.0f} of all devices, with all of this"
        + ("" if found.days is None else f"; {found.days:,.1f} days to the tokens asked for, going on so"),
        "What is lost in learning by staleness is not in it.",
    ]
    return "\n".join(lines)


def _shares(run: Run) -> list[str]:
    rows = [(_NAMED[name], percent(share)) for name, share in run.shares.items() if share or name == "computing"]
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {share.rjust(7)}" for name, share in rows]


def _failing(found: SimulatedWorkers) -> str:
    if found.mtbf is None:
        known = "no device fails" if found.question.cluster.mtbf else "nobody said how often devices fail (--mtbf)"
        return f"failures: {known}"
    often = f"a device fails every {duration(found.mtbf)} in the mean"
    return f"failures: {found.run.failures:,}; {often}; its worker is back after {duration(found.question.restart)}"


def result(found: SimulatedWorkers) -> dict[str, Any]:
    """For scripts: docs/simulate.md says what each key is."""
    run, plan = found.run, found.staged.plan
    return {
        "layout": str(plan.layout), "chunks": plan.chunks, "schedule": plan.layout.schedule,
        "fits": found.staged.fits, "steps": found.steps, "predicted_step_seconds": plan.seconds,
        "step_seconds": run.seconds / found.steps, "seconds": run.seconds, "shares": dict(run.shares),
        "staleness": {str(age): many for age, many in run.staleness.items()}, "staleness_mean": run.mean_staleness,
        "staleness_max": max(run.staleness), "updates": np.asarray(run.updates).tolist(), "mtbf_seconds": found.mtbf,
        "restart_seconds": found.question.restart, "failures": run.failures,
        "tokens_per_second": found.tokens_per_second, "days": found.days,
    }  # fmt: skip
