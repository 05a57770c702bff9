"""Going on with a run: which job and which text, and what may not change on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from shoal import checkpoint
from shoal.data.prepare import Prepared, prepare
from shoal.errors import CheckpointError, DataError, JobError
from shoal.job import Job, read_run
from shoal.observe import commands
from shoal.observe.hold import hold
from shoal.training.folder import DATA, PULLED


def resumable(job: Job, folder: Path, say: Callable[[str], None]) -> Prepared:
    """The token store that the run in `folder` began with; made again where it has been deleted.

    Raises JobError where `job` would make another run of it.
    """
    before = read_run(folder)
    _refuse_pulled(folder)
    try:
        with hold(folder):  # refuses while somebody trains in it
            pass
    except OSError as error:
        what = f"the run folder cannot be written or locked: {error.strerror}"
        raise JobError(what, where=str(folder), fix="copy it to a disk where you may") from None
    if before.layout is None:  # every run's has one
        fix = f"write its tables again, from the recipe; then `shoal train --resume {folder}`"
        raise JobError("job.toml of this run is damaged: it names no layout", where=str(folder / "job.toml"), fix=fix)
    _same_run(before, job, folder)
    if before.train.steps and not (job.train.steps or job.endless):
        what = f"a run that goes on has no length by minutes: it is one of {before.train.steps:,} steps"
        fix = f"say how many it shall have in all: --steps {2 * before.train.steps}"
        raise JobError(what, where=str(folder), fix=fix)
    try:
        known = msgspec.json.decode((folder / DATA).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError):
        raise CheckpointError("the run cannot be resumed: data.json is missing or damaged", where=str(folder)) from None
    if (Path(known["folder"]) / "meta.json").exists():
        return _unchanged(Prepared.load(Path(known["folder"])), known["fingerprint"], job)
    if job.data.source == ("-",):
        raise DataError(
            "the run was trained on standard input, and its token store is gone",
            where=known["folder"],
            fix=f"start a new run from {folder / 'model'} (--model.weights)",
        )
    return _unchanged(prepare(job.data, say=say), known["fingerprint"], job)


def _unchanged(prepared: Prepared, fingerprint: str, job: Job) -> Prepared:
    """A growing store has a name of the user's, who may have begun another one under it; else text was read again."""
    if prepared.fingerprint != fingerprint:
        raise DataError(
            "the text has changed since this run began, and its token store is gone",
            where=", ".join(job.data.source),
            fix="restore the text as it was, or start a new run from model/ of this one (model.weights)",
        )
    return prepared


def _refuse_pulled(folder: Path) -> None:
    """Raises JobError for weights that `shoal pull` has taken out of a run."""
    if not (folder / PULLED).is_file():
        return
    try:
        run = msgspec.json.decode((folder / PULLED).read_bytes())["run"]
    except (OSError, msgspec.DecodeError, LookupError, TypeError):
        run = "RUN"
    out = folder.with_name(f"{folder.name}-hf")
    raise JobError(
        "this is no run but weights that `shoal pull` has taken out of one: the optimizer's state stayed there",
        where=str(folder),
        fix=f"{commands.resume(run)} goes on with the run; to begin a new one from these weights, `shoal ckpt "
        f"export-hf {folder} {out}`, then `shoal train --model.weights {out}`; `shoal generate {folder}` uses them",
    )


def _same_run(before: Job, job: Job, folder: Path) -> None:
    """Position in the data is one integer: it means other samples where anything that orders them has changed."""
    names = [("data", name) for name in vars(before.data) if name not in ("cache", "workers")]
    names += [("model", name) for name in vars(before.model)]
    names += [("train", "seed"), ("optim", "name")]
    for table, name in names:
        old, new = (getattr(getattr(one, table), name) for one in (before, job))
        if old != new:
            raise JobError(
                f"{table}.{name} cannot change while a run goes on: {old!r} → {new!r}",
                where=str(folder),
                fix=f"leave it out, or begin a new run from its weights: --model.weights {folder / 'model'}",
            )


def way_on(folder: Path) -> str:
    """What to do after a run broke off; empty where nothing was saved."""
    newest = next(iter(checkpoint.complete(folder / "checkpoints")), None)
    return f"{commands.resume(folder)} goes on from {newest.name}" if newest else ""
