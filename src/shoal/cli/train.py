"""`shoal train`: default < recipe (or the job of the run to resume) < command line, then `shoal.train`."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from signal import Signals
from typing import Annotated

import msgspec
import tyro

from shoal.cli import flags
from shoal.cli.answer import Answer
from shoal.errors import JobError
from shoal.job import Job, Layout, blame, read, read_run
from shoal.job.check import at_least
from shoal.job.idle import without_idle
from shoal.job.train import TrainOptions

SHORT = {
    "--data": "--data.source",
    "--steps": "--train.steps",
    "--minutes": "--train.minutes",
    "--run-dir": "--run.dir",
    "--trace": "--run.trace",
    "--sync": "--sync.name",
    "--codec": "--sync.codec",
    "--servers": "--server.shards",
    "--copies": "--server.copies",
    "--mode": "--server.mode",
    "--staleness": "--server.staleness",
    "--max-staleness": "--server.max-staleness",
    "--quorum": "--server.quorum",
    "--grace": "--server.grace",
    "--compensation": "--server.compensation",
}


@dataclass(frozen=True)
class Train(Job):
    """Trains a language model. Leaves a run folder: job.toml, metrics, log, checkpoints, report.html, model.

    $ shoal train                                            a small model on the source of Python's library
    $ shoal train recipes/quickstart.toml --optim.lr 3e-4    a recipe, one option changed
    $ shoal train --data my.txt folder/ --steps 500          your own text
    $ shoal train --resume runs/quickstart-...               go on where a run stopped

    What is not given on the command line comes from the recipe, and what is not in the recipe is the default.
    --data, --steps, --minutes, --run-dir, --trace, --sync, --codec: short for --data.source, --train.steps,
    --train.minutes, --run.dir, --run.trace, --sync.name, --sync.codec. --servers: short for --server.shards.
    --mode, --staleness, --max-staleness, --quorum, --grace, --copies, --compensation: options of --server likewise.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE.toml]")] = ""
    """TOML file of options, in the tables and names below: [optim] lr = 3e-4."""
    resume: str = ""
    """Folder of a run to go on with: its job, with what the command line changes (a longer run, another
    layout), from its newest undamaged checkpoint."""
    workers: int = 0
    """Replicas of the layout, in place of those that a recipe names; 0 = as the layout says."""
    format: str = "text"
    """`json` prints one JSON object as the last line on standard output, all else on standard error."""


def run(args: list[str]) -> Answer:
    """Trains. Where a signal stopped the run, the exit code is 128 + its number."""
    options = flags.parse(Train, args, "shoal train", short=SHORT)
    layout_given = any(word.partition("=")[0] == "--layout" for word in args)
    if options.workers < 1 and any(word.partition("=")[0] == "--workers" for word in args):
        raise JobError(f"--workers={options.workers} is less than 1", fix="1 or more")
    if options.recipe and options.resume:
        raise JobError("a recipe and --resume are both given", fix="a run has its own job.toml: leave out one of them")
    if options.resume and options.run.dir:
        raise JobError("--run-dir and --resume are both given", fix="a run stays in its folder: leave out --run-dir")
    if not options.resume and not options.recipe:
        flags.refuse_recipe_as_text(options.data.source, "shoal train")
        job = _job(options, layout_given)
    else:
        file = f"{options.resume}/job.toml" if options.resume else options.recipe
        base = read_run(options.resume) if options.resume else read(file)
        options = flags.parse(Train, args, "shoal train", short=SHORT, default=Train(**vars(base)))
        if options.resume and (going_on := _going_on(base, options)) != base:
            base = going_on
            options = flags.parse(Train, args, "shoal train", short=SHORT, default=Train(**vars(base)))
        _refuse_idle_minutes(base.train, options.train)
        job = _job(options, layout_given)
        try:
            job = job.validate()
        except JobError as error:
            raise blame(error, file, base) from None

    from shoal.launch import elastic
    from shoal.launch.train import train

    result = train(job, resume=options.resume or None)
    stopped = Signals.__members__.get(result.stopped_by, Signals.SIGTERM) if result.stopped_by else 0
    silent = elastic.is_worker() and os.environ["RANK"] != "0"
    return Answer(None if silent else msgspec.Raw(result.line().encode()), 128 + stopped if stopped else 0)


def _going_on(before: Job, given: Train) -> Job:
    """The job of the run before, without what it said for another sync or mode than it shall go on with: that had no
    effect, or has none any more, and who goes on with a run has not said it now."""
    sync = replace(before.sync, name=given.sync.name)
    server = replace(before.server, mode=given.server.mode, local_steps=given.server.local_steps)
    return without_idle(replace(before, sync=sync, server=server))


def _job(options: Train, layout_given: bool) -> Job:
    """layout_given: on the command line, where --workers may add to it and must not contradict it."""
    job = Job(**{f.name: getattr(options, f.name) for f in fields(Job)})
    if not options.workers:
        return job
    at_least("--workers", options.workers, 1)
    layout = job.layout or Layout()
    if layout_given and layout.replicas not in (1, options.workers):
        raise JobError(
            f"--workers {options.workers} and --layout {layout} are both given: workers are the replicas of the layout",
            fix=f"leave out --workers, or take --layout {replace(layout, replicas=options.workers)}",
        )
    return replace(job, layout=replace(layout, replicas=options.workers))


def _refuse_idle_minutes(file: TrainOptions, given: TrainOptions) -> None:
    """Steps of a file would silently win over minutes of the command line."""
    if given.minutes != file.minutes and given.steps == file.steps > 0:
        raise JobError(
            f"--minutes has no effect: the job has train.steps={file.steps}",
            fix="give --steps instead; for a new run, --steps 0 makes the minutes count",
        )
