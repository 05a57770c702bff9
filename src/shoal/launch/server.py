"""A job with a parameter server: coordinator, shards and workers, each started again if it is lost.

`run` starts them on this machine; those that `server.elsewhere` names are started by `shoal join` (`join.py`), on
machines that have the run's folder, too.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import JobError
from shoal.job import Job, parse, write
from shoal.job.server import ROUNDS, pushed_batch, too_many
from shoal.launch import local, roles
from shoal.launch.cores import threads_per_rank
from shoal.launch.ranks import Ranks
from shoal.launch.roles import Role
from shoal.models.spec import parameters
from shoal.observe import files
from shoal.training.folder import SERVER

_ROOM = "shoal.training.server"
# What its processes run.
ENTRIES = [f"{_ROOM}.{name}" for name in ("settle", "trial", "begin", "coordinate", "hold", "work", "evaluate")]
# Of the run's folder, with journal and logs; and in it, what whoever joins needs: while links are tried, and when
# training begins.
FOLDER, TRIAL, START = SERVER, "trial.json", "start.json"


class Start(msgspec.Struct, frozen=True):
    """job: TOML; of `auto`, only a codec for which links are being tried. nonce: of this start of the run, whose parts
    find only each other."""

    job: str
    prepared: str
    nonce: str


def run(
    job: Job, arguments: dict[str, Any], ranks: Ranks, say: Callable[[str], None], stopping: Callable[[str], None]
) -> dict[str, Any]:
    """From the job to its figures, as `training.worker.main` gives them. arguments: of that, too."""
    folder, started = arguments["folder"], arguments["started"]
    here = {name: arguments[name] for name in ("folder", "job", "prepared")}
    threads, minutes = job.run.threads, not (job.train.steps or job.endless)
    nonce = f"{round(started * 1e6):x}"
    with _nobody_joins(Path(folder) / FOLDER):
        if _undecided(job):
            told = {**here, "job": _of_this_machine(here["job"]), "started": started}
            found = local.run(f"{_ROOM}.settle:main", told, ranks_here(job), threads, stopping, ranks)["job"]
            here["job"] = _of_all_machines(found, job)
            job = parse(here["job"])
        for name in job.server.elsewhere:
            say(f"to be started elsewhere: shoal join {Path(folder).absolute()} '{name}'")
        if job.sync.codec == "auto":
            # While links are tried, addresses are written already.
            local.run(f"{_ROOM}.begin:check", {"folder": folder, "job": here["job"]}, 1, ranks=ranks)
            job = _tried(job, folder, Start(here["job"], here["prepared"], nonce), ranks, say, stopping)
            here["job"] = write(job)
        local.run(f"{_ROOM}.begin:main", {"folder": folder, "job": here["job"]}, 1, ranks=ranks)
    start = Start(here["job"], here["prepared"], nonce)
    files.replace(Path(folder) / FOLDER / START, msgspec.json.encode(start))
    if job.server.local_steps > 1 and job.server.mode not in ROUNDS and job.server.compensation == "none":
        say("warning: each push alone moves the weights with full momentum; --compensation delayed-nesterov shares it")
    lead = {**here, "nonce": nonce, "started": started, "minutes": minutes, "command": arguments["command"]}
    first = Role("coordinator", f"{_ROOM}.coordinate:main", lead)
    try:
        figures = roles.run(ranks, [first, *_roles(job, folder, start)], say=say, on_signal=stopping)
    finally:
        # Nobody can join a run that has ended.
        (Path(folder) / FOLDER / START).unlink(missing_ok=True)
    if not figures["stopped_by"]:
        told = {**here, "job": _of_this_machine(figures["job"]), "step": figures["step"]}
        figures["validation"] = local.run(f"{_ROOM}.evaluate:main", told, ranks_here(job), threads, ranks=ranks)
        if (found := figures["validation"]) is not None:
            say(f"validation loss {found['nats']:.4f} nats per token, over {found['tokens']:,} tokens")
    return figures


@contextlib.contextmanager
def _nobody_joins(folder: Path) -> Iterator[None]:
    """An earlier start of the run, which was killed: nobody takes part in it from here on. Where this one fails, all is
    as it was."""
    before = {path: path.read_bytes() for name in (TRIAL, START) if (path := folder / name).is_file()}
    for path in before:
        path.unlink()
    try:
        yield
    except BaseException:
        for path, content in before.items():
            path.parent.mkdir(exist_ok=True)
            files.replace(path, content)
        raise


def _tried(
    job: Job, folder: str, start: Start, ranks: Ranks, say: Callable[[str], None], stopping: Callable[[str], None]
) -> Job:
    """With the codec that pays on the links between all machines; waits for the parts that others start (`join`)."""
    path = Path(folder) / FOLDER / TRIAL
    path.parent.mkdir(exist_ok=True)
    files.replace(path, msgspec.json.encode(start))
    lead = Role("coordinator", f"{_ROOM}.trial:lead", {"folder": folder, "job": start.job})
    parts = [trying(part) for part in _roles(job, folder, start) if part.args.get("copy", 0) == 0]
    try:
        codec = roles.run(ranks, [lead, *parts], say=say, on_signal=stopping)
    finally:
        path.unlink(missing_ok=True)
    return replace(job, sync=replace(job.sync, codec=codec))


def trying(part: Role) -> Role:
    """A part of the job while links are tried: one process, however many ranks it will be."""
    name = f"server {part.args['number']}" if "copy" in part.args else part.name
    told = {"folder": part.args["folder"], "job": part.args["job"], "part": name, "host": part.args.get("host", "")}
    until = str(Path(part.args["folder"]) / FOLDER / TRIAL)
    return Role(part.name, f"{_ROOM}.trial:take_part", {**told, "until": until}, threads=part.threads)


def _roles(job: Job, folder: str, start: Start) -> list[Role]:
    """All parts of the job that this machine starts, but for the coordinator."""
    assert job.layout is not None
    told = {"folder": folder, "job": start.job, "nonce": start.nonce}
    shards = [
        shard(job, told, number, copy)
        for number in range(job.server.shards)
        for copy in range(job.server.copies)
        if f"server {number}" not in job.server.elsewhere
    ]
    here = [number for number in range(job.layout.replicas) if f"worker {number}" not in job.server.elsewhere]
    told["prepared"] = start.prepared
    return shards + [worker(job, told, number, place, len(here)) for place, number in enumerate(here)]


def shard(job: Job, args: dict[str, Any], number: int, copy: int = 0) -> Role:
    """A copy of a server shard, which listens on this machine's server.host. args: of `training.server.hold`."""
    name = f"server {number}" + (f" copy {copy}" if job.server.copies > 1 else "")
    return Role(name, f"{_ROOM}.hold:main", {**args, "number": number, "copy": copy, "host": job.server.host})


def worker(job: Job, args: dict[str, Any], number: int, place: int = 0, workers: int = 1) -> Role:
    """A worker. args: of `training.server.work`. place: of it among the workers that share this machine's devices."""
    assert job.layout is not None
    group = job.layout.ranks_per_replica
    return Role(
        f"worker {number}", f"{_ROOM}.work:main", {**args, "number": number}, ranks=group, first=place * group,
        neighbours=workers * group, threads=threads_per_rank(job.run.threads, workers * group),
    )  # fmt: skip


def check(job: Job) -> None:
    """Raises JobError for what its processes would refuse, while there is no run yet. job: its vocabulary is known."""
    learned = sum(spec.learned for spec in parameters(job.model).values())
    if job.server.shards > learned:
        raise too_many(job.server.shards, learned)
    may_listen(job.server.host, "server.host")
    if job.server.token or job.server.certificate:
        # Here and not above: it imports torch.
        from shoal.sync.server.wire import Credentials

        credentials = Credentials.of(job.server)
        if credentials.tls:
            credentials.context(ssl.Purpose.CLIENT_AUTH)


def may_listen(host: str, option: str) -> None:
    """Raises JobError for an address that this machine does not have."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
    except OSError as error:
        what = f"{option}={host}: this machine cannot listen there: {error.strerror or error}"
        raise JobError(what, fix=f"{option}: an address that it has (`ip -brief address`)") from None


def _local_workers(job: Job) -> int:
    """Workers of this machine; at least one, for measuring and the last validation."""
    assert job.layout is not None
    elsewhere = sum(name.startswith("worker ") for name in job.server.elsewhere)
    return max(1, job.layout.replicas - elsewhere)


def ranks_here(job: Job) -> int:
    """Ranks of this machine's workers."""
    assert job.layout is not None
    return job.layout.ranks_per_replica * _local_workers(job)


def _of_this_machine(text: str) -> str:
    """The job with its share of the batch for the workers that are here."""
    job = parse(text)
    assert job.layout is not None
    here = _local_workers(job)
    if here == job.layout.replicas:
        return text
    batch = pushed_batch(job) // job.layout.replicas * here
    layout = replace(job.layout, replicas=here, replica_share="")
    return write(replace(job, layout=layout, train=replace(job.train, global_batch=batch)))


def _of_all_machines(text: str, job: Job) -> str:
    """What was measured here, of the whole job."""
    found = parse(text)
    assert found.layout is not None
    assert job.layout is not None
    layout = replace(found.layout, replicas=job.layout.replicas)
    if job.server.elsewhere:
        layout = replace(layout, replica_share=job.layout.replica_share)
    return write(replace(found, layout=layout, train=replace(found.train, global_batch=job.train.global_batch)))


def _undecided(job: Job) -> bool:
    assert job.layout is not None
    autos = [job.train.precision, job.train.compile, job.layout.replica_share]
    if not job.server.elsewhere:
        autos.append(job.sync.codec)
    measured = not (job.train.steps or job.endless) or "auto" in autos
    return measured or not job.train.validate_every or not job.checkpoint.every
