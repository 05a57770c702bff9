"""Online learning: a job on a token store that grows while it is trained on (docs/parameter-server.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.job.check import require
from shoal.job.train import TrainOptions

if TYPE_CHECKING:
    from shoal.job.job import Job


def check_growing(job: Job) -> None:
    """What goes with `data.grow`, and without an end. Raises JobError that names two options."""
    if not job.data.grow:
        return
    what = f"data.grow with sync.name={job.sync.name}: only workers of a parameter server can wait for text"
    require(job.sync.name == "server", what, "--sync server, or train on the text as it is now, without the store")
    if job.train.steps:
        return
    minutes = job.train.minutes
    what = f"data.grow with train.minutes={minutes:g}: without train.steps it goes on until it is asked to stop"
    require(minutes == TrainOptions.minutes, what, "train.steps, or stop it by Ctrl-C or SIGTERM when it is time")
    what = f"data.grow without train.steps has no end by which optim.schedule={job.optim.schedule} could go"
    fix = "--optim.schedule constant --optim.warmup 100 (steps; or 0), or train.steps"
    require(job.optim.schedule == "constant", what, fix)
    what = f"data.grow without train.steps: optim.warmup={job.optim.warmup:g} is a share of steps without a number"
    require(not 0 < job.optim.warmup <= 1, what, "--optim.warmup 100 (steps), or 0, or train.steps")
