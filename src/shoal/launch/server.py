"""A job with a parameter server on this machine: coordinator, shards and workers, each started again if it is lost."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.job import Job, parse
from shoal.job.server import too_many
from shoal.launch import local, roles
from shoal.launch.cores import threads_per_rank
from shoal.launch.ranks import Ranks
from shoal.launch.roles import Role
from shoal.models.spec import parameters

_ROOM = "shoal.training.server"
# What its processes run.
ENTRIES = [f"{_ROOM}.{name}" for name in ("settle", "begin", "coordinate", "hold", "work", "evaluate")]
# Of the run's folder, with journal and logs: `shoal.sync.server.node.book`.
_FOLDER = "server"


def run(
    job: Job, arguments: dict[str, Any], ranks: Ranks, say: Callable[[str], None], stopping: Callable[[str], None]
) -> dict[str, Any]:
    """From the job to its figures, as `training.worker.main` gives them. arguments: of that, too."""
    assert job.layout is not None
    command = arguments.pop("command")
    here = {name: arguments[name] for name in ("folder", "job", "prepared")}
    minutes = not job.train.steps
    world = job.layout.world
    if _undecided(job):
        told = {**here, "started": arguments["started"]}
        here["job"] = local.run(f"{_ROOM}.settle:main", told, world, job.run.threads, stopping, ranks)["job"]
        job = parse(here["job"])
    assert job.layout is not None
    local.run(f"{_ROOM}.begin:main", {"folder": here["folder"], "job": here["job"]}, 1, ranks=ranks)
    lead = {**here, "started": arguments["started"], "minutes": minutes, "command": command}
    group = world // job.layout.replicas
    threads = threads_per_rank(job.run.threads, world)
    nonce = f"{round(arguments['started'] * 1e6):x}"
    parts = [Role("coordinator", f"{_ROOM}.coordinate:main", lead)]
    parts += [
        _shard(job, {**_without_text(here), "nonce": nonce}, number, copy)
        for number in range(job.server.shards)
        for copy in range(job.server.copies)
    ]
    parts += [
        Role(
            f"worker {number}", f"{_ROOM}.work:main", {**here, "number": number}, ranks=group, first=number * group,
            neighbours=world, threads=threads,
        )
        for number in range(job.layout.replicas)
    ]  # fmt: skip
    figures = roles.run(ranks, parts, say=say, on_signal=stopping)
    if not figures["stopped_by"]:
        told = {**here, "job": figures["job"], "step": figures["step"]}
        figures["validation"] = local.run(f"{_ROOM}.evaluate:main", told, world, job.run.threads, ranks=ranks)
        if (found := figures["validation"]) is not None:
            say(f"validation loss {found['nats']:.4f} nats per token, over {found['tokens']:,} tokens")
    return figures


def check(job: Job) -> None:
    """Raises JobError for what its processes would refuse, while there is no run yet. job: its vocabulary is known."""
    learned = sum(spec.learned for spec in parameters(job.model).values())
    if job.server.shards > learned:
        raise too_many(job.server.shards, learned)
    if job.server.token or job.server.certificate:
        # Here and not above: it imports torch.
        from shoal.sync.server.wire import Credentials

        credentials = Credentials.of(job.server)
        if credentials.tls:
            credentials.context(ssl.Purpose.CLIENT_AUTH)


def _shard(job: Job, args: dict[str, Any], number: int, copy: int) -> Role:
    name = f"server {number}" + (f" copy {copy}" if job.server.copies > 1 else "")
    return Role(name, f"{_ROOM}.hold:main", {**args, "number": number, "copy": copy})


def _undecided(job: Job) -> bool:
    assert job.layout is not None
    autos = (job.train.precision, job.train.compile, job.sync.codec)
    return not job.train.steps or "auto" in autos or not job.train.validate_every or not job.checkpoint.every


def _without_text(here: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in here.items() if name != "prepared"}


def forget(folder: Path) -> None:
    """Of a run that goes on without a server: journal and logs would not follow from its checkpoints any more."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
