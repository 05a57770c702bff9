"""`shoal.train`: from a job to a finished run, on local ranks or as one of torchrun's."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.checkpoint import hf_folder
from shoal.data.prepare import Prepared, prepare
from shoal.errors import JobError, ShoalError
from shoal.job import Job, Layout, write
from shoal.job.machine import FILES
from shoal.job.nearby import of_world
from shoal.launch import auto_layout, elastic, local, server, torchrun
from shoal.launch.cores import too_many_workers
from shoal.launch.ranks import Ranks
from shoal.launch.resume import resumable, way_on
from shoal.models import config
from shoal.observe import commands, report
from shoal.observe.hold import attend
from shoal.observe.log import speaker
from shoal.observe.result import Result
from shoal.training.folder import fill

if TYPE_CHECKING:
    from shoal.mesh import Seat

_WORKER, _FINISH = "shoal.launch.work", "shoal.launch.finish"


def train(job: Job, *, resume: str | Path | None = None) -> Result:
    """Trains on this machine and returns what came out; `run` in it is the run folder.

    resume: a run folder whose newest undamaged checkpoint is the start; `job` is then its job.toml with what shall
    change, e.g. the layout or the number of steps. Under torchrun, this process becomes one of its ranks.
    Raises ShoalError for the user's mistakes, RankError for a lost rank, KeyboardInterrupt where the run was killed
    before it could save.
    """
    started = time.time()
    job = job.validate()
    if elastic.is_worker():
        here = {"job": job, "resume": resume, "started": started}
        return Result(**torchrun.run("shoal.launch.train:one_of_many", here, job.run.threads))
    ranks = Ranks(
        [*(server.ENTRIES if job.sync.name == "server" else [_WORKER]), _FINISH]
    )  # imports torch while the text is prepared
    try:
        job, arguments = ready(job, resume, started)
        assert job.layout is not None
        folder = Path(arguments["folder"])
        say = speaker(folder)
        if warning := too_many_workers(server.ranks_here(job)):
            say(f"warning: {warning}")

        stopped: list[str] = []

        def stopping(name: str) -> None:
            stopped.append(name)
            say(f"{name}: ends after this {_unit(job)}, saved (before the first one: at once); once more to kill")

        with attend(folder), _broken_off(folder):
            if job.sync.name == "server":
                figures = server.run(job, arguments, ranks, say, stopping)
            else:
                figures = local.run(f"{_WORKER}:main", arguments, job.layout.world, job.run.threads, stopping, ranks)
            if figures["stopped_by"] and stopped:
                figures["stopped_by"] = stopped[0]  # ranks only know our SIGTERM
            return Result(**local.run(f"{_FINISH}:main", _afterwards(arguments, figures), 1, ranks=ranks))
    finally:
        ranks.close()


def _unit(job: Job) -> str:
    """After which all ranks know that one was asked to stop."""
    return {"local": "round", "gossip": "round, or some more", "server": "gradient of each worker"}.get(
        job.sync.name, "step"
    )


@contextlib.contextmanager
def _broken_off(folder: Path) -> Iterator[None]:
    """A run that ends too early still has its report, and says how to go on with it if anything was saved."""
    try:
        yield
    except KeyboardInterrupt as error:
        report.failed(folder, error)
        name = error.name if isinstance(error, local.Interrupted) else "SIGINT"
        raise local.Interrupted(name, way_on(folder) or "nothing was saved yet") from None
    except Exception as error:
        if isinstance(error, ShoalError) and elastic.is_mistake(error):
            raise
        report.failed(folder, error)
        print(way_on(folder) or "nothing was saved yet", file=sys.stderr)  # before the root cause, which comes last
        raise


def one_of_many(seat: Seat, *, job: Job, resume: str | Path | None, started: float) -> dict[str, Any]:
    """One rank of torchrun's: rank 0 prepares for all. Returns the fields of the Result."""
    from shoal.launch import finish, work

    def prepared() -> dict[str, Any]:
        fitting = replace(job, layout=job.layout or Layout(replicas=seat.world))
        _fits(fitting, seat.world)
        if warning := too_many_workers(seat.neighbours):
            print(f"warning: {warning}", flush=True)
        return ready(fitting, resume, started)[1]

    arguments = torchrun.from_rank_0(seat, "ready", prepared)
    folder = Path(arguments["folder"])
    with attend(folder) if seat.member == 0 else contextlib.nullcontext():
        with _broken_off(folder) if seat.member == 0 else contextlib.nullcontext():
            figures = work.main(seat, **arguments)
        return torchrun.from_rank_0(seat, "finished", lambda: finish.main(seat, **_afterwards(arguments, figures)))


def _afterwards(arguments: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    return {"folder": arguments["folder"], "prepared": arguments["prepared"], "figures": figures}


def _fits(job: Job, world: int) -> None:
    assert job.layout is not None
    if job.sync.name == "server":
        fix = "shoal train without torchrun: it starts coordinator, servers and workers, on this machine"
        raise JobError("a job with sync.name=server is not one of torchrun's", fix=fix)
    if job.layout.world != world:
        near = of_world(job.layout, world, lambda layout: replace(job, layout=layout).validate())
        raise JobError(
            f"layout {job.layout} has {job.layout.world} ranks, torchrun started {world}",
            fix=f"torchrun --nproc-per-node {job.layout.world}, or {f'layout {near}' if near else 'another layout'}",
        )


def ready(job: Job, resume: str | Path | None, started: float) -> tuple[Job, dict[str, Any]]:
    """Text prepared, layout and architecture resolved, run folder made: the job and the worker's arguments.

    A run that goes on keeps its files as they are until its checkpoint has been loaded into the job.
    """
    say = speaker()
    job = absolute_paths(job)
    if resume is None:
        folder = _new_folder(job)
        job = architecture(job)
        if job.model.weights:
            hf_folder.weights(Path(job.model.weights), say)
        prepared = prepare(job.data, say=say)
    else:
        folder = Path(resume)
        prepared = resumable(job, folder, say)
    job = vocabulary(job, prepared)
    job = replace(job, layout=job.layout or auto_layout.choose(job, say)).validate()
    if job.sync.name == "server":
        server.check(job)
    try:
        if resume is None:
            folder = folder if job.run.dir else _reserved(folder)
        # A copy of its job.toml makes a new run, not this folder's.
        job = replace(job, run=replace(job.run, dir=""))
        if resume is None:
            fill(folder, job, prepared)
    except OSError as error:
        fix = "name another with --run-dir, or make space"
        raise JobError(f"cannot write the run folder: {error.strerror}", where=str(folder), fix=fix) from None
    arguments = {
        "folder": str(folder), "job": write(job), "prepared": str(prepared.folder), "started": started,
        "command": sys.argv,
    }  # fmt: skip
    return job, arguments


def absolute_paths(job: Job) -> Job:
    """Absolute paths, so that the run's job.toml means the same wherever it is read."""
    source = tuple(s if s in ("python", "-") else _absolute(s) for s in job.data.source)
    tokenizer = job.data.tokenizer
    if tokenizer not in ("auto", "bpe", "bytes"):
        tokenizer = _absolute(tokenizer)
    weights, cache = (_absolute(path) if path else "" for path in (job.model.weights, job.data.cache))
    files: dict[str, Any] = {name: _absolute(path) for name in FILES if (path := getattr(job.server, name))}
    return replace(
        job,
        server=replace(job.server, **files),
        data=replace(job.data, source=source, tokenizer=tokenizer, cache=cache),
        model=replace(job.model, weights=weights),
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def architecture(job: Job) -> Job:
    """With weights from a folder, the architecture is the folder's, and so is the tokenizer if none is named."""
    tokenizer = job.data.tokenizer
    if job.model.weights and tokenizer == "auto":
        tokenizer = job.model.weights
    elif tokenizer == "auto" and not job.data.grow:  # a growing store has its own
        tokenizer = "bpe"
    job = config.architecture(job)
    return replace(job, data=replace(job.data, tokenizer=tokenizer))


def vocabulary(job: Job, prepared: Prepared) -> Job:
    if job.model.vocab_size == 0:
        return replace(job, model=replace(job.model, vocab_size=prepared.vocab_size))
    if job.model.vocab_size < prepared.vocab_size:
        raise JobError(
            f"the tokenizer has {prepared.vocab_size} tokens, the model's vocabulary only {job.model.vocab_size}",
            fix="take the model's own tokenizer (data.tokenizer), or for a new model leave out model.vocab_size",
        )
    return job


def _new_folder(job: Job) -> Path:
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(job.run.dir or f"runs/{job.run.name}-{now}")
    if job.run.dir and any((folder / name).exists() for name in ("job.toml", "metrics.jsonl", "checkpoints")):
        raise JobError(
            "there is a run in this folder already",
            where=str(folder),
            fix=f"{commands.resume(folder)}, or another --run-dir",
        )
    return folder


def _reserved(folder: Path) -> Path:
    """The folder, or one of a like name where another run began in the same second."""
    number = 1
    while True:
        reserved = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with contextlib.suppress(FileExistsError):
            reserved.mkdir(parents=True)
            return reserved
        number += 1
