"""A planned run, simulated and told: where its time goes, what failed, how much of it counts, beside closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import JobError
from shoal.observe import files, page, perfetto
from shoal.observe.charts_trace import trace_chart
from shoal.observe.units import counted, percent, short
from shoal.observe.units import duration as whole_seconds
from shoal.planning import failures, goodput, pictured, show, simulation
from shoal.planning.goodput import Goodput
from shoal.planning.plan import Question, brief
from shoal.planning.scene import Staged
from shoal.planning.simulation import Failures, Outcome

# Failures that are told one by one, of many.
_TOLD = 5
_NAMED = {
    "work": "training that counts", "stragglers": "waiting for slow devices", "checkpoints": "checkpoints",
    "again": "training that is lost", "restarts": "restarts",
}  # fmt: skip


@dataclass(frozen=True)
class Simulated:
    """usual: seconds of a step on equal devices. bubble: share of it in which ranks do not compute, but for what ends
    it. expected: shares of a run without end, of all that fails and of checkpoints; None where no run would get on."""

    question: Question
    staged: Staged
    steps: int
    seed: int
    failures: Failures
    outcome: Outcome
    usual: float
    bubble: float
    expected: Goodput | None

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, with all that went wrong."""
        return self.question.global_batch * self.question.sequence * self.steps / self.outcome.seconds

    @property
    def days(self) -> float | None:
        """To the token target, going on so. None without one."""
        tokens = self.question.tokens
        return None if tokens is None else goodput.days(tokens, self.tokens_per_second)


def simulate(question: Question, staged: Staged, steps: int, mtbf: float | None, every: int, seed: int) -> Simulated:
    """mtbf: seconds between failures of any device; None = none fails. every: steps between checkpoints; 0 = as many
    as lose least. JobError for what cannot be simulated."""
    usual = simulation.usual_seconds(staged.scene)
    stall = failures.stall_of(question)
    if not every and mtbf is not None:
        every = max(1, round(goodput.interval(stall, mtbf) / usual))
    rules = Failures(mtbf, question.restart, every, stall)
    found = simulation.run(staged.scene, steps, rules, seed)
    first = simulation.picture(staged.scene, seed, 1)
    return Simulated(
        question, staged, steps, seed, rules, found, usual, float(first.step.bubble[0]), _expected(rules, usual)
    )


def _expected(rules: Failures, usual: float) -> Goodput | None:
    every = rules.every * usual or None
    if every is None:
        return Goodput(np.inf, 1.0, 0.0, 0.0, 0.0)
    try:
        return goodput.goodput(rules.stall, rules.restart, rules.mtbf, every)
    except JobError:
        return None


def text(found: Simulated) -> str:
    """The whole answer."""
    question, plan, scene = found.question, found.staged.plan, found.staged.scene
    actor = f" of {counted(scene.devices, 'device')}" if scene.devices > 1 else ""
    lines = [
        show.title(question),
        f"{brief(plan.layout)}",
        f"{counted(found.steps, 'step')}, {counted(scene.pipelines, 'pipeline')} of {counted(scene.ranks, 'rank')}"
        f"{actor}, seed {found.seed}",
        "",
        *_table(found.outcome),
        "",
        f"a step: {_steps(found)}",
        *_failing(found),
        f"tokens/s: {found.tokens_per_second:,.0f} of all devices, with all of this"
        + ("" if found.days is None else f"; {found.days:,.1f} days to the tokens asked for, going on so"),
    ]
    if not found.staged.fits:
        need, has = plan.total / 2**30, plan.capacity / 2**30
        lines.append(f"It does not fit: {need:,.0f} GiB are predicted on the fullest device, of {has:,.0f}.")
    return "\n".join(lines)


def _while(seconds: float) -> str:
    """`3:59`, and below a minute `2.48 s`."""
    return whole_seconds(seconds) if seconds >= 60 else short(seconds)


def _table(outcome: Outcome) -> Sequence[str]:
    # What is left of sums that cancel is nothing.
    least = 1e-9 * outcome.seconds
    parts = [(_NAMED[name], seconds) for name, seconds in outcome.parts.items() if seconds > least]
    rows = [(name, _while(seconds), f"{percent(seconds / outcome.seconds)}") for name, seconds in parts]
    rows.append(("together", _while(outcome.seconds), "100.0 %"))
    widths = [max(len(row[n]) for row in rows) for n in range(3)]
    return [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}" for a, b, c in rows]


def _steps(found: Simulated) -> str:
    predicted = found.staged.plan.seconds
    said = f"{short(predicted)} predicted, {short(found.usual)} simulated on equal devices"
    if found.staged.scene.ranks > 1:
        said += f" ({percent(found.bubble)} of the pipeline's time is waiting)"
    steps = found.outcome.steps
    if np.ptp(steps) > 0:
        middle, late = np.quantile(steps, (0.5, 0.9))
        return f"{said}; here {short(float(middle))} in the median, 90 % within {short(float(late))}"
    return said if abs(steps[0] / found.usual - 1) < 1e-9 else f"{said}; here {short(float(steps[0]))}"


def _failing(found: Simulated) -> list[str]:
    rules, failed = found.failures, found.outcome.failures
    if rules.mtbf is None:
        known = "no device fails" if found.question.cluster.mtbf else "nobody said how often devices fail (--mtbf)"
        return [f"failures: {known}"]
    often = f"a device fails every {_while(rules.mtbf)} in the mean"
    saves = f"a checkpoint every {counted(rules.every, 'step')} takes {short(rules.stall)}"
    lines = [f"failures: {len(failed):,}; {often}, a restart takes {_while(rules.restart)}, {saves}"]
    lines += [f"  after {_while(one.at)}, in step {one.step + 1:,}: {_while(one.lost)} lost" for one in failed[:_TOLD]]
    lines += [f"  and {len(failed) - _TOLD:,} more"] if len(failed) > _TOLD else []
    mean = "none: no run would get on" if found.expected is None else percent(found.expected.training)
    lines.append(
        f"goodput: {percent(found.outcome.goodput)} of the time is training that counts; without slow devices {mean} "
        "are expected of a run without end"
    )
    return lines


def result(found: Simulated) -> dict[str, Any]:
    """For scripts: docs/simulate.md says what each key is."""
    plan, outcome, rules = found.staged.plan, found.outcome, found.failures
    middle, late = np.quantile(outcome.steps, (0.5, 0.9))
    return {
        "layout": str(plan.layout), "chunks": plan.chunks, "schedule": plan.layout.schedule,
        "fits": found.staged.fits, "steps": found.steps, "predicted_step_seconds": plan.seconds,
        "step_seconds": found.usual, "median_step_seconds": float(middle), "p90_step_seconds": float(late),
        "bubble": found.bubble, "seconds": outcome.seconds, "parts_seconds": dict(outcome.parts),
        "goodput": outcome.goodput, "expected_goodput": None if found.expected is None else found.expected.training,
        "mtbf_seconds": rules.mtbf, "restart_seconds": rules.restart, "checkpoint_every": rules.every,
        "checkpoint_seconds": rules.stall, "failures": [one._asdict() for one in outcome.failures],
        "tokens_per_second": found.tokens_per_second, "days": found.days,
    }  # fmt: skip


def draw(question: Question, staged: Staged, seed: int, pipelines: int, timeline: str, trace: str) -> str:
    """Files of the first step, of the first pipelines: a page, and one for Perfetto; empty = none. Says which. JobError
    where one cannot be written."""
    scene = staged.scene
    many = min(pipelines, scene.pipelines)
    drawn = pictured.recordings(scene, simulation.picture(scene, seed, many), range(many))
    written = [file for file in (timeline, trace) if file]
    try:
        if trace:
            perfetto.write(Path(trace), drawn)
        if timeline:
            chart = trace_chart(drawn)
            charts = [chart] if chart else []
            under = f"{staged.plan.layout} · simulated, {counted(many, 'pipeline')} of {scene.pipelines:,}"
            whole = page.page(show.title(question).partition("\n")[0], under, [page.plots(charts)], charts)
            files.replace(Path(timeline), whole.encode())
    except OSError as error:
        raise JobError(f"the first step cannot be written: {error}", fix="another file") from None
    return f"the first step of {counted(many, 'pipeline')}: {' and '.join(written)}"
