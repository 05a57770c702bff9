"""`shoal check`: does the job compute the same in every layout? Small, on this machine, against one process."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from shoal.data.prepare import prepare
from shoal.errors import JobError, RankError
from shoal.job import Job, Layout, write
from shoal.job.check import at_least
from shoal.job.every import accumulated, layouts, refusal, small
from shoal.launch.pool import Pool
from shoal.launch.train import absolute_paths, architecture, vocabulary

ENTRY = "shoal.training.equality:record"
_COMPARE = "shoal.training.equality:compare"

# Bounds in float64, where rounding hides nothing; and what cannot be told apart in the other precisions.
_FLOAT64 = {"gradient": 1e-10, "weight": 1e-8, "loss": 1e-8}
_EPSILON = {"fp32": 2**-23, "bf16": 2**-8}
# What makes the noise floor: orders of one process's sequences, sizes of its micro-batches, products in two halves.
_REORDERED = ((1, 0, False), (2, 4, False), (3, 1, False), (0, 0, True))
# What the learning rate is tried as: times the job's own, and for SGD as it is.
_FACTORS, _RATES = (1, 3, 10, 30, 100, 0.3), (0.3, 1.0, 3.0, 10.0, 0.1, 0.03)
_LEARNS = 0.95


@dataclass(frozen=True)
class Row:
    """One layout against one process. Differences are relative; each beside its bound is the one nearest to it.

    max_rel_diff_loss: of losses and gradient norms. error: what ended the run, where it did not reach its end.
    """

    layout: str
    steps: int
    dtype: str
    optimizer: str
    max_rel_diff_grad: float = math.nan
    max_rel_diff_loss: float = math.nan
    max_rel_diff_weights: float = math.nan
    bound: float = math.nan
    bound_grad: float = math.nan
    bound_loss: float = math.nan
    worst_gradient: str = ""
    same_samples: bool = False
    ok: bool = False
    error: str = ""


@dataclass(frozen=True)
class Refused:
    layout: str
    reason: str


@dataclass(frozen=True)
class Report:
    ok: bool
    rows: list[Row]
    refused: list[Refused]


def check(
    job: Job,
    *,
    processes: int = 4,
    only: Sequence[str] = (),
    dtypes: Sequence[str] = ("fp64",),
    steps: int = 20,
    say: Callable[[str], None] = lambda line: None,
    on_row: Callable[[Row], None] = lambda row: None,
    entry: str = ENTRY,
) -> Report:
    """Trains the job, shrunk, in every layout of `processes` ranks (or those in `only`) and on one process.

    In float64 with SGD and with the job's own optimizer, in other precisions with its own. say: gets a sentence now and
    then. on_row: gets each row as soon as it is known. Raises ShoalError for the user's mistakes, and where
    the shrunk job learns nothing, so that nothing could be said.
    """
    at_least("processes", processes, 2)
    at_least("steps", steps, 2)
    named = [Layout.parse(text) for text in only]
    for dtype in dtypes:
        if dtype not in ("fp64", *_EPSILON):
            raise JobError(f"dtype '{dtype}' is unknown", fix="fp64, fp32 or bf16")
    job = architecture(absolute_paths(job))
    prepared = prepare(job.data, say=say)
    job = replace(vocabulary(job, prepared), layout=None)
    given = named or layouts(processes, job.model.num_experts)
    refused = [Refused(str(layout), reason) for layout in given if (reason := refusal(job, layout))]
    kept = [layout for layout in given if not refusal(job, layout)]
    if not kept:
        return Report(False, [], refused)
    most = max(layout.world for layout in kept)
    with tempfile.TemporaryDirectory() as scratch, Pool(most, [ENTRY.partition(":")[0]]) as pool:
        bench = _Bench(pool, small(job, processes, kept), str(prepared.folder), steps, Path(scratch), entry)
        rows = []
        for dtype in dtypes:
            for optimizer in dict.fromkeys(("sgd", job.optim.name) if dtype == "fp64" else (job.optim.name,)):
                reference = bench.reference(dtype, optimizer)
                told = f"one process goes from a loss of {reference.told(0)} to {reference.told(-1)}"
                say(f"{dtype} with {optimizer}: {told}")
                for layout in kept:
                    rows.append(bench.row(layout, dtype, optimizer, reference))
                    on_row(rows[-1])
    # A layout that was asked for by name and cannot be is no success.
    return Report(all(row.ok for row in rows) and not (only and refused), rows, refused)


@dataclass(frozen=True)
class _Reference:
    """What one process did. floor: how far its losses and norms move in other orders, 0 in float64."""

    job: Job
    folder: str
    result: dict[str, Any]
    reordered: list[str]
    floor: float

    def told(self, step: int) -> str:
        return f"{self.result['losses'][step]:.3f}"


class _Bench:
    """Runs the small job in one layout after another."""

    def __init__(self, pool: Pool, job: Job, prepared: str, steps: int, scratch: Path, entry: str):
        self.pool, self.prepared, self.scratch, self.entry = pool, prepared, scratch, entry
        self.job = replace(job, train=replace(job.train, steps=steps))
        self._count = 0

    def reference(self, dtype: str, optimizer: str) -> _Reference:
        """One process, at the first learning rate at which it learns, clipped to half its first gradient norm."""
        usual = self.job.optim.lr
        own = optimizer == self.job.optim.name
        for lr in [usual * factor for factor in _FACTORS] if own else _RATES:
            optim = replace(self.job.optim, name=optimizer, lr=lr, clip=0.0)
            job = replace(self.job, optim=optim, train=replace(self.job.train, precision=dtype))
            (first,), _ = self._run(replace(job, train=replace(job.train, steps=1)), Layout())
            job = replace(job, optim=replace(optim, clip=first["norms"][0] / 2))
            (result,), folder = self._run(job, Layout())
            losses = result["losses"]
            if len(losses) == job.train.steps and min(losses) >= 0 and losses[-1] <= _LEARNS * losses[0]:
                break
        else:
            raise JobError(
                f"the job, made small, does not learn with {optimizer}: in {self.job.train.steps} steps the loss of "
                f"one process does not fall by 5 % at any of {len(_FACTORS)} learning rates",
                fix="give more text, or more --steps",
            )
        if dtype == "fp64":
            return _Reference(job, folder, result, [], 0.0)
        others = [self._run(job, Layout(micro_batch=micro), order, halves) for order, micro, halves in _REORDERED]
        floor = max(_apart(other, result) for (other,), _ in others)
        return _Reference(job, folder, result, [where for _, where in others], floor)

    def row(self, layout: Layout, dtype: str, optimizer: str, reference: _Reference) -> Row:
        job = reference.job
        row = Row(str(layout), job.train.steps, dtype, optimizer)
        try:
            results, folder = self._run(job, accumulated(job, layout))
            bounds = _FLOAT64 if dtype == "fp64" else dict.fromkeys(("gradient", "weight", "loss"), _EPSILON[dtype])
            (worst,) = self.pool.run(
                _COMPARE, 1, folder=folder, reference=reference.folder, reordered=reference.reordered, bounds=bounds
            )
        except (RankError, JobError) as error:
            return replace(row, error=str(error))
        loss = max(_apart(result, reference.result) for result in results)
        bound_loss = max(bounds["loss"], 4 * reference.floor)
        samples = _same_samples(results, reference.result)
        good = [found["difference"] <= found["bound"] for found in worst.values()]
        return replace(
            row,
            max_rel_diff_grad=worst["gradient"]["difference"],
            max_rel_diff_loss=loss,
            max_rel_diff_weights=worst["weight"]["difference"],
            bound=worst["weight"]["bound"],
            bound_grad=worst["gradient"]["bound"],
            bound_loss=bound_loss,
            worst_gradient=worst["gradient"]["name"],
            same_samples=samples,
            ok=all(good) and loss <= bound_loss and samples,
        )

    def _run(self, job: Job, layout: Layout, order: int = 0, halves: bool = False) -> tuple[list[dict[str, Any]], str]:
        """What each rank returned, and the folder of what they wrote."""
        self._count += 1
        folder = self.scratch / str(self._count)
        folder.mkdir()
        job = replace(job, layout=layout).validate()
        results = self.pool.run(
            self.entry, layout.world, job=write(job), prepared=self.prepared, folder=str(folder), order=order,
            halves=halves, timeout=600.0,
        )  # fmt: skip
        return results, str(folder)


def _apart(result: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest relative difference of losses and gradient norms; inf where some are missing or no numbers."""
    worst = 0.0
    for what in ("losses", "norms"):
        if len(result[what]) != len(reference[what]):
            return math.inf
        for ours, right in zip(result[what], reference[what], strict=True):
            difference = abs(ours / right - 1) if right else abs(ours)
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def _same_samples(results: list[dict[str, Any]], reference: dict[str, Any]) -> bool:
    """Whether the readers together read, in every step, each sample of the one process's once."""
    readers = {result["reader"]: result["samples"] for result in results}
    if any(result["samples"] != readers[result["reader"]] for result in results):
        return False  # ranks that share sequences read different ones
    steps = [sorted(chain(*parts)) for parts in zip(*readers.values(), strict=True)]
    return steps == [sorted(step) for step in reference["samples"]]
