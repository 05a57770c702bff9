"""`shoal check`: the user's own job, made small, in every layout against one process."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.cli.train import SHORT
from shoal.errors import JobError
from shoal.job import Job, blame, read

if TYPE_CHECKING:
    from shoal.launch.check import Row

_LINE = "{:<58} {:<10} {:>15} {:>15} {:>15}  {}"

_NOT_TRIED = "not tried: {}, train.compile, full sizes, weights of a folder, checkpoints, validation: docs/check.md"


@dataclass(frozen=True)
class Check(Job):
    """Trains the job, made small, in every layout that so many processes allow, and compares each with one process.

    $ shoal check recipes/quickstart.toml
    $ shoal check runs/my-run/job.toml --processes 8 --layout tensor=2,pipeline=2 --layout fsdp=4

    In float64, where rounding cannot hide a mistake: the first gradient of every parameter within 1e-10 of its norm,
    losses, gradient norms and weights within 1e-8 over all steps, with SGD and with the job's own optimizer. In fp32
    and bf16: within 4 times what the job itself moves on one process when only the order of its sums changes
    (weights: or a share of what training moved them). Exit code 1 if anything exceeds its bound. Always uncompiled;
    the bounds, and which layouts are tried: docs/check.md.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="JOB.toml")] = ""
    """TOML file of options, or the job.toml of a run."""
    processes: int = 0
    """Ranks of the largest layout, 2 to 32; smaller ones are tried too. A --layout of more ranks than given here is
    refused. 0 = 4, or as many as the largest --layout has."""
    layouts: tuple[str, ...] = ()
    """Only these layouts (also --layout, which may be repeated)."""
    dtype: tuple[str, ...] = ("fp64",)
    """Precisions: fp64, fp32, bf16."""
    check_steps: int = 20
    """Steps of each run, 2 or more."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output, all else on standard error."""


def run(args: list[str]) -> Answer:
    """Prints a table, a line as soon as it is known."""
    args, only = _layouts(args)
    options = flags.parse(Check, args, "shoal check", short=SHORT)
    if options.recipe:
        base = read(options.recipe)
        options = flags.parse(Check, args, "shoal check", short=SHORT, default=Check(**vars(base)))
    job = Job(**{f.name: getattr(options, f.name) for f in fields(Job) if f.name != "layout"})
    try:
        job = job.validate()
    except JobError as error:
        raise blame(error, options.recipe, base) if options.recipe else error from None

    from shoal.launch.check import check

    def show(row: Row) -> None:
        numbers = (f"{difference:.1e}/{bound:.0e}" for difference, bound in row.pairs().values())
        print(_LINE.format(row.layout, f"{row.dtype} {row.optimizer}", *numbers, _told(row)), flush=True)

    print(_LINE.format("layout", "", "gradient/bound", "loss/bound", "weights/bound", ""))
    only += options.layouts
    report = check(
        job, processes=options.processes, only=only, dtypes=options.dtype, steps=options.check_steps, say=print,
        on_row=show,
    )  # fmt: skip
    for refused in report.refused:
        print(f"refused: {refused.layout}: {refused.reason}")
    same = sum(row.ok for row in report.rows)
    print(f"{same} of {len(report.rows)} rows compute the same as one process; {len(report.refused)} layouts refused")
    if options.format == "text":
        print(_NOT_TRIED.format("other layouts" if only else "larger products of rarer options"))
    return Answer(report, 0 if report.ok else 1)


def _told(row: Row) -> str:
    if row.ok:
        return "ok"
    if row.error:
        return row.error.strip().splitlines()[-1]
    names = {"gradient": f"gradient of {row.worst_grad}", "loss": "loss", "weights": row.worst_weights}
    return "DIFFERS: " + ", ".join(names[what] for what, (found, bound) in row.pairs().items() if not found <= bound)


def _layouts(args: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Takes every `--layout L` out of the words."""
    left, found = [], []
    words = iter(args)
    for word in words:
        flag, given, value = word.partition("=")
        if flag != "--layout":
            left.append(word)
            continue
        value = value if given else next(words, "")
        if not value:
            raise JobError("--layout needs a value", fix="e.g. --layout tensor=2,pipeline=2")
        found.append(value)
    return left, tuple(found)
