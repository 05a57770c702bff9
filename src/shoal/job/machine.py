"""What one machine has of its own, where it joins a run with a parameter server that another one leads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.errors import JobError
from shoal.job.check import at_least, require
from shoal.job.job import Job
from shoal.job.server import OF_SO_MANY

FILES = ("token", "certificate", "key", "authority")
"""Options of [server] that are paths of files, which each machine may have elsewhere."""


@dataclass(frozen=True)
class MachineOptions:
    """Empty and 0: as the job says, on the same paths as on the machine that leads."""

    data: str = ""
    """Of a worker: folder with the run's prepared text, or that with a growing store; empty = the path on the first
    machine (data.cache)."""
    token: str = ""
    """File with the job token, a copy of the first machine's; empty = the path there (server.token)."""
    certificate: str = ""
    """PEM file with this machine's certificate; empty = the path on the first machine (server.certificate)."""
    key: str = ""
    """PEM file with its private key; empty = the path on the first machine (server.key)."""
    authority: str = ""
    """PEM file with the certificates by which all machines' are signed; empty = the path on the first machine
    (server.authority)."""
    host: str = ""
    """Of a server: address of this machine on which it listens; empty = server.host of the job. A worker listens to
    nobody."""
    threads: int = 0
    """Of a worker on CPU: threads of each rank; 0 = run.threads of the job, and where that is 0 this machine's cores /
    ranks of the worker."""
    micro_batch: int = 0
    """Of a worker: sequences that a rank computes at a time, as fits this machine's memory; 0 = micro_batch of the
    layout. What it computes is the same."""


def check_beyond(job: Job) -> None:
    """Raises JobError where no worker can join beyond those of the job."""
    assert job.layout is not None
    compensation, workers = job.server.compensation, job.layout.replicas
    what = f"server.compensation={compensation}: servers go by the {workers} workers of the job, no other can join"
    fix = f"`shoal train --resume RUN --workers {workers + 1}` on the first machine, or another server.compensation"
    require(compensation not in OF_SO_MANY, what, fix)


def on_machine(job: Job, part: str, own: MachineOptions) -> Job:
    """The job as this machine computes its part, `worker 1` or `server 0`. own: its paths are absolute.

    `own.micro_batch` is not in it: what workers are granted goes by the layout's. Raises JobError for what has no
    effect there.
    """
    assert job.layout is not None
    at_least("--micro-batch", own.micro_batch, 0)
    at_least("--threads", own.threads, 0)
    layout = job.layout
    what = f"--micro-batch {own.micro_batch} with pipeline={layout.pipeline}: its schedule is made for the layout's"
    require(not own.micro_batch or layout.pipeline == 1, what, "leave it out; layout micro_batch=N is of all workers")
    for name in ("data", "threads", "micro_batch"):
        what = f"--{name.replace('_', '-')} has no effect with {part}: it is of workers"
        require(part.startswith("worker ") or not getattr(own, name), what, "leave it out")
    what = f"--host has no effect with {part}: it is of servers, a worker connects with them and listens to nobody"
    require(part.startswith("server ") or not own.host, what, "leave it out")
    files = {name: path for name in FILES if (path := getattr(own, name))}
    for name in files:
        if not getattr(job.server, name):
            what = f"--{name} in a run that was begun without server.{name}"
            raise JobError(what, fix=f"leave it out; or --server.{name} where the run is begun, or resumed")
    run = replace(job.run, threads=own.threads or job.run.threads)
    run.validate()
    return replace(job, run=run, server=replace(job.server, host=own.host or job.server.host, **files))
