"""`shoal check`: does the job compute the same in every layout? Small, on this machine, against one process."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from shoal.data.prepare import prepare
from shoal.errors import JobError, RankError
from shoal.job import Job, Layout, write
from shoal.job.check import at_least, count, require
from shoal.job.every import MOST_PROCESSES, accumulated, layouts, refusal, small
from shoal.job.idle import without_idle
from shoal.launch.pool import Pool
from shoal.launch.train import absolute_paths, architecture, vocabulary

ENTRY = "shoal.training.equality:record"
_COMPARE = "shoal.training.equality:compare"

# In float64, where rounding hides nothing, bounds; in the others what cannot be told apart: weights are kept in fp32,
# and in that a loss, which is a sum over all tokens, is right to a few units of its last place.
# turned: in how many elements of a tensor chance may undo what training did, root of their number.
_BOUNDS = {
    "fp64": {"gradient": 1e-10, "weight": 1e-8, "loss": 1e-8, "turned": 0.0},
    "fp32": {"gradient": 2**-23, "weight": 2**-23, "loss": 2**-20, "turned": 0.1},
    "bf16": {"gradient": 2**-8, "weight": 2**-23, "loss": 2**-8, "turned": 3.0},
}
# What the learning rate is tried as: times the job's own, and for SGD as it is.
_FACTORS, _RATES = (1, 3, 10, 30, 100, 0.3), (0.3, 1.0, 3.0, 10.0, 0.1, 0.03)
_LEARNS = 0.95


@dataclass(frozen=True)
class Row:
    """One layout against one process. `ok` is: no error, and none of the three differences exceeds `bound`.

    layout: as it was asked for; ran: with all that was decided for it. Differences are relative, of the tensor that
    comes nearest to its own bound (worst_…, bound_…); loss: of losses and gradient norms. bound: the least of those
    that were exceeded; if none was, the largest. error: what ended the run or makes a difference infinite.
    """

    layout: str
    steps: int
    dtype: str
    max_rel_diff_grad: float = math.nan
    max_rel_diff_loss: float = math.nan
    max_rel_diff_weights: float = math.nan
    bound: float = math.nan
    ok: bool = False
    optimizer: str = ""
    ran: str = ""
    bound_grad: float = math.nan
    bound_loss: float = math.nan
    bound_weights: float = math.nan
    worst_grad: str = ""
    worst_weights: str = ""
    same_samples: bool = False
    error: str = ""

    def pairs(self) -> dict[str, tuple[float, float]]:
        """Each difference with its own bound: of gradient, loss, weights."""
        return {
            "gradient": (self.max_rel_diff_grad, self.bound_grad),
            "loss": (self.max_rel_diff_loss, self.bound_loss),
            "weights": (self.max_rel_diff_weights, self.bound_weights),
        }

    def judged(self) -> Row:
        """With `bound` and `ok`."""
        exceeded = [bound for difference, bound in self.pairs().values() if not difference <= bound]
        bound = min(exceeded) if exceeded else max(bound for _, bound in self.pairs().values())
        return replace(self, bound=bound, ok=not exceeded and not self.error)


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
    processes: int = 0,
    only: Sequence[str] = (),
    dtypes: Sequence[str] = ("fp64",),
    steps: int = 20,
    say: Callable[[str], None] = lambda line: None,
    on_row: Callable[[Row], None] = lambda row: None,
    entry: str = ENTRY,
) -> Report:
    """Trains the job, shrunk, in every layout of up to `processes` ranks (or those in `only`) and on one process.

    processes: 2 to MOST_PROCESSES; 0 = 4, or as many as the largest of `only` has.
    In float64 with SGD and with the job's own optimizer, in other precisions with its own. say: gets a sentence now and
    then. on_row: gets each row as soon as it is known. Where one process learns nothing, or does not reach its end,
    nothing can be said of the layouts: their rows have that as `error`. Raises ShoalError for the user's mistakes.
    """
    at_least("steps", steps, 2)
    for dtype in dtypes:
        if dtype not in _BOUNDS:
            raise JobError(f"dtype '{dtype}' is unknown", fix="fp64, fp32 or bf16")
    named = {text: Layout.parse(text) for text in only}
    processes = _processes(processes, named)
    job = architecture(absolute_paths(job))
    prepared = prepare(job.data, say=say)
    if job.sync.codec not in ("none", "auto"):
        say(f"sync.codec={job.sync.codec} rounds each replica's gradient, so no two layouts agree: checked without")
    if job.sync.name != "allreduce":
        say(f"sync.name={job.sync.name} lets replicas differ, so no two layouts agree: checked with allreduce")
    sync = replace(job.sync, name="allreduce", codec="none")
    # Of a store that grows, the text that there is now.
    data = replace(job.data, grow=False)
    job = without_idle(replace(vocabulary(job, prepared), layout=None, sync=sync, data=data))
    given = named or {str(layout): layout for layout in layouts(processes, job.model.num_experts)}
    reasons = {text: refusal(job, layout) for text, layout in given.items()}
    refused = [Refused(text, reason) for text, reason in reasons.items() if reason]
    kept = {text: layout for text, layout in given.items() if not reasons[text]}
    if not kept:
        return Report(False, [], refused)
    most = max(layout.world for layout in kept.values())
    runs = [(dtype, name) for dtype in dtypes for name in _optimizers(job, dtype)]
    several, left = count(len(runs) * len(kept), "row"), count(len(refused), "layout")
    say(f"{count(len(kept), 'layout')}, {several}; {left} {'is' if len(refused) == 1 else 'are'} not for this job")
    rows = []
    with tempfile.TemporaryDirectory() as scratch, Pool(most, [entry.partition(":")[0]]) as pool:
        reduced = small(job, processes, list(kept.values()))
        bench = _Bench(pool, reduced, str(prepared.folder), steps, Path(scratch), entry)
        for dtype, optimizer in runs:
            for row in bench.rows(kept, dtype, optimizer, say):
                rows.append(row)
                on_row(row)
    # A layout that was asked for by name and cannot be is no success.
    return Report(all(row.ok for row in rows) and not (only and refused), rows, refused)


def _processes(asked: int, named: dict[str, Layout]) -> int:
    """As many as were asked for, which is enough for every layout that was named. Else JobError."""
    text, largest = max(((t, layout.world) for t, layout in named.items()), key=lambda pair: pair[1], default=("", 0))
    processes = asked or max(4, largest)
    at_least("processes", processes, 2)
    most = f"processes={processes} is more than {MOST_PROCESSES}" if asked else f"layout {text} is of {largest} ranks"
    fix = f"give {MOST_PROCESSES} or less: all of them run on this machine"
    require(processes <= MOST_PROCESSES, most, fix)
    enough = f"--processes {largest}, or a smaller layout"
    require(largest <= processes, f"layout {text} is of {largest} ranks, and processes={processes}", enough)
    return processes


def _optimizers(job: Job, dtype: str) -> list[str]:
    return list(dict.fromkeys(("sgd", job.optim.name) if dtype == "fp64" else (job.optim.name,)))


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

    def rows(self, given: dict[str, Layout], dtype: str, optimizer: str, say: Callable[[str], None]) -> Iterator[Row]:
        blank = Row("", self.job.train.steps, dtype, optimizer=optimizer)
        try:
            reference = self.reference(dtype, optimizer)
        except (RankError, JobError) as error:
            say(f"{dtype} with {optimizer}: {error}")
            yield from (replace(blank, layout=text, error=_sentence(error)) for text in given)
            return
        told = f"one process goes from a loss of {reference.told(0)} to {reference.told(-1)}"
        say(f"{dtype} with {optimizer}: {told}")
        for text, layout in given.items():
            yield self.row(replace(blank, layout=text), layout, reference)

    def reference(self, dtype: str, optimizer: str) -> _Reference:
        """One process, at the first learning rate at which it learns, clipped to half its first gradient norm.

        Raises JobError where it learns at none.
        """
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
                fix="give more text, or more --check-steps",
            )
        if dtype == "fp64":
            return _Reference(job, folder, result, [], 0.0)
        others = [self._run(job, Layout(micro_batch=m), order, sums) for order, m, sums in _reorderings(job)]
        floor = max(_apart(other, result) for (other,), _ in others)
        if not math.isfinite(floor):
            raise JobError(
                f"one process does not reach the end with {optimizer} in {dtype} when its sequences are in another "
                "order: loss or gradient is no number",
                fix="check it in fp32 or fp64",
            )
        return _Reference(job, folder, result, [where for _, where in others], floor)

    def row(self, row: Row, layout: Layout, reference: _Reference) -> Row:
        try:
            job = replace(reference.job, layout=accumulated(reference.job, layout)).validate()
            row = replace(row, ran=str(job.layout))
            results, folder = self._run(job, job.layout)
            bounds = _BOUNDS[row.dtype]
            (worst,) = self.pool.run(
                _COMPARE, 1, folder=folder, reference=reference.folder, reordered=reference.reordered, bounds=bounds
            )
        except (RankError, JobError) as error:
            return replace(row, error=_sentence(error))
        gradient, weight = worst["gradient"], worst["weight"]
        samples = _same_samples(results, reference.result)
        loss = max(_apart(result, reference.result) for result in results)
        flaws = [
            gradient["flaw"],
            weight["flaw"],
            "" if math.isfinite(loss) else "losses or gradient norms are not finite, or of fewer steps",
            "" if samples else "the ranks read other samples than one process",
        ]
        return replace(
            row,
            max_rel_diff_grad=gradient["difference"],
            max_rel_diff_loss=loss,
            max_rel_diff_weights=weight["difference"],
            bound_grad=gradient["bound"],
            bound_loss=max(bounds["loss"], 4 * reference.floor),
            bound_weights=weight["bound"],
            worst_grad=gradient["name"],
            worst_weights=weight["name"],
            same_samples=samples,
            error="; ".join(filter(None, flaws)),
        ).judged()

    def _run(self, job: Job, layout: Layout | None, order: int = 0, sums: int = 1) -> tuple[list[dict[str, Any]], str]:
        """What each rank returned, and the folder of what they wrote."""
        self._count += 1
        folder = self.scratch / str(self._count)
        folder.mkdir()
        job = replace(job, layout=layout).validate()
        assert job.layout is not None
        results = self.pool.run(
            self.entry, job.layout.world, job=write(job), prepared=self.prepared, folder=str(folder), order=order,
            sums=sums, timeout=600.0,
        )  # fmt: skip
        return results, str(folder)


def _reorderings(job: Job) -> list[tuple[int, int, int]]:
    """What makes the noise floor: orders of one process's sequences, sizes of its micro-batches (0: all in one), and
    in how many parts its products are summed."""
    batch = job.train.global_batch
    half = max(size for size in range(1, batch) if batch % size == 0)
    return [(1, 0, 1), (2, half, 1), (3, 1, 1), (0, 0, 2), (4, half, 3), (5, 1, 4)]


def _sentence(error: RankError | JobError) -> str:
    return str(error) if isinstance(error, RankError) else f"{error.what} ({error.fix})"


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
