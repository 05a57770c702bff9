"""A job with a parameter server: coordinator, shards and workers, each started again if it is lost.

`run` starts them on this machine; those that `server.elsewhere` names are started by `join`, on machines that have the
run's folder, too.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import JobError
from shoal.job import Job, parse, write
from shoal.job.check import nearest
from shoal.job.server import ROUNDS, pushed_batch, too_many
from shoal.launch import local, roles
from shoal.launch.cores import threads_per_rank
from shoal.launch.ranks import Ranks
from shoal.launch.roles import Role
from shoal.models.spec import parameters
from shoal.observe import files
from shoal.observe.hold import alone
from shoal.observe.log import speaker

_ROOM = "shoal.training.server"
# What its processes run.
ENTRIES = [f"{_ROOM}.{name}" for name in ("settle", "trial", "begin", "coordinate", "hold", "work", "evaluate")]
# Of the run's folder, with journal and logs: `shoal.sync.server.node.book`. And in it, what whoever joins needs: while
# links are tried, and when training begins.
_FOLDER, _TRIAL, _START = "server", "trial.json", "start.json"
# Seconds between two looks for a run that has not begun.
_AGAIN = 0.2


class _Start(msgspec.Struct, frozen=True):
    """job: TOML; of `auto`, only a codec for which links are being tried. nonce: of this start of the run."""

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
    # Of an earlier start.
    for name in (_TRIAL, _START):
        (Path(folder) / _FOLDER / name).unlink(missing_ok=True)
    if _undecided(job):
        told = {**here, "job": _of_this_machine(here["job"]), "started": started}
        found = local.run(f"{_ROOM}.settle:main", told, _world(job), threads, stopping, ranks)["job"]
        here["job"] = _of_all_machines(found, job)
        job = parse(here["job"])
    for name in job.server.elsewhere:
        say(f"to be started elsewhere: shoal join {folder} '{name}'")
    if job.sync.codec == "auto":
        job = _tried(job, folder, _Start(here["job"], here["prepared"], nonce), ranks, say, stopping)
        here["job"] = write(job)
    local.run(f"{_ROOM}.begin:main", {"folder": folder, "job": here["job"]}, 1, ranks=ranks)
    start = _Start(here["job"], here["prepared"], nonce)
    files.replace(Path(folder) / _FOLDER / _START, msgspec.json.encode(start))
    if job.server.local_steps > 1 and job.server.mode not in ROUNDS and job.server.compensation == "none":
        say("warning: each push alone moves the weights with full momentum; --compensation delayed-nesterov shares it")
    lead = {**here, "started": started, "minutes": minutes, "command": arguments["command"]}
    parts = [part for part in _roles(job, folder, start, job.server.host) if part.name not in job.server.elsewhere]
    first = Role("coordinator", f"{_ROOM}.coordinate:main", lead)
    try:
        figures = roles.run(ranks, [first, *parts], say=say, on_signal=stopping)
    finally:
        # Nobody can join a run that has ended.
        (Path(folder) / _FOLDER / _START).unlink(missing_ok=True)
    if not figures["stopped_by"]:
        told = {**here, "job": _of_this_machine(figures["job"]), "step": figures["step"]}
        figures["validation"] = local.run(f"{_ROOM}.evaluate:main", told, _world(job), threads, ranks=ranks)
        if (found := figures["validation"]) is not None:
            say(f"validation loss {found['nats']:.4f} nats per token, over {found['tokens']:,} tokens")
    return figures


def _tried(
    job: Job, folder: str, start: _Start, ranks: Ranks, say: Callable[[str], None], stopping: Callable[[str], None]
) -> Job:
    """With the codec that pays on the links between all machines; waits for the parts that others start (`join`)."""
    path = Path(folder) / _FOLDER / _TRIAL
    path.parent.mkdir(exist_ok=True)
    files.replace(path, msgspec.json.encode(start))
    lead = Role("coordinator", f"{_ROOM}.trial:lead", {"folder": folder, "job": start.job})
    parts = [part for part in _roles(job, folder, start, job.server.host) if part.name not in job.server.elsewhere]
    try:
        trying = [_trying(part, job.server.host) for part in parts if part.args.get("copy", 0) == 0]
        codec = roles.run(ranks, [lead, *trying], say=say, on_signal=stopping)
    finally:
        path.unlink(missing_ok=True)
    return replace(job, sync=replace(job.sync, codec=codec))


def _trying(part: Role, host: str) -> Role:
    """A part of the job while links are tried: one process, however many ranks it will be."""
    name = f"server {part.args['number']}" if "copy" in part.args else part.name
    told = {"folder": part.args["folder"], "job": part.args["job"], "part": name, "host": host}
    until = str(Path(part.args["folder"]) / _FOLDER / _TRIAL)
    return Role(part.name, f"{_ROOM}.trial:take_part", {**told, "until": until}, threads=part.threads)


def join(folder: Path, name: str, host: str = "", patience: float = 60.0) -> None:
    """Takes one part in a run that another machine leads, until the run is over; a worker, or until a first signal.

    name: `worker 2`, `server 0`. host: of this machine, on which a shard listens; empty = server.host. patience:
    seconds to wait for the run to begin. Raises JobError where there is no such run or part.
    """
    say, tried = speaker(), ""
    taken = JobError(f"another process is {name} of this run", where=str(folder), fix="end that `shoal join` first")

    def stopping(signal: str) -> None:
        say(f"{signal}: {name} leaves the run after the gradient that it is at; again: at once")

    with contextlib.ExitStack() as ending:
        ranks: Ranks | None = None
        while True:
            start = _wait(folder, patience, tried)
            trial = parse(start.job).sync.codec == "auto"
            part = _joining(folder, name, host, start, trial)
            with alone(folder / _FOLDER / f"{name.replace(' ', '-')}.lock", taken, patience=1.0):
                if ranks is None:
                    ranks = Ranks(ENTRIES)
                    ending.callback(ranks.close)
                say(f"{name} of {folder}" + ": the links between machines are tried" * trial)
                leaves = name.startswith("worker ") and not trial
                roles.run(ranks, [part], say=say, on_signal=stopping if leaves else None)
            if not trial:
                return
            tried = start.nonce


def _joining(folder: Path, name: str, host: str, start: _Start, trial: bool) -> Role:
    """This part of the run, or of the trial before it. JobError where it is none that another machine may take."""
    job = parse(start.job)
    host = host or job.server.host
    parts = {part.name: part for part in _roles(job, str(folder.absolute()), start, host)}
    if name not in job.server.elsewhere:
        what = f"this run has no part '{name}' for another machine"
        fix = "the run's first machine starts it, unless --server.elsewhere names it when the run is begun or resumed"
        if job.server.elsewhere:
            fix = nearest(name, list(job.server.elsewhere))
        raise JobError(what, where=str(folder), fix=fix)
    if name.startswith("server "):
        _may_listen(host, "--host")
    if trial:
        return _trying(parts[name], host)
    return replace(parts[name], args=parts[name].args | ({"leaves": True} if name.startswith("worker ") else {}))


def _wait(folder: Path, patience: float, tried: str) -> _Start:
    """What the run's first machine has written, once it has. tried: the start whose links have been tried already."""
    deadline = time.monotonic() + patience
    if (start := _begun(folder, tried)) is None:
        speaker()(f"waits up to {patience:g} s for the run's first machine to begin it")
    while start is None:
        if time.monotonic() > deadline:
            what = f"no run with a parameter server goes on here, nor has one begun within {patience:g} s"
            fix = f"start `shoal train --sync server --run-dir {folder}` first, or `shoal train --resume {folder}`"
            raise JobError(what, where=str(folder), fix=fix)
        time.sleep(_AGAIN)
        start = _begun(folder, tried)
    return start


def _begun(folder: Path, tried: str) -> _Start | None:
    """Of a run, or of the trial before it."""
    for name in (_START, _TRIAL):
        path = folder / _FOLDER / name
        try:
            start = msgspec.json.decode(path.read_bytes(), type=_Start)
        except FileNotFoundError:
            continue
        except msgspec.DecodeError:
            raise JobError(f"the run's {name} is damaged", where=str(path), fix="start the run again") from None
        if name == _START or start.nonce != tried:
            return start
    return None


def _roles(job: Job, folder: str, start: _Start, host: str) -> list[Role]:
    """All parts of the job but the coordinator."""
    assert job.layout is not None
    world, workers = job.layout.world, job.layout.replicas
    group, here = world // workers, _world(job)
    threads = threads_per_rank(job.run.threads, here)
    text = {"folder": folder, "job": start.job}
    shards = [
        _shard(job, {**text, "nonce": start.nonce, "host": host}, number, copy)
        for number in range(job.server.shards)
        for copy in range(job.server.copies)
    ]
    at_work = {**text, "prepared": start.prepared}
    return shards + [
        Role(
            f"worker {number}", f"{_ROOM}.work:main", {**at_work, "number": number}, ranks=group,
            first=number * group % here, neighbours=here, threads=threads,
        )
        for number in range(workers)
    ]  # fmt: skip


def check(job: Job) -> None:
    """Raises JobError for what its processes would refuse, while there is no run yet. job: its vocabulary is known."""
    learned = sum(spec.learned for spec in parameters(job.model).values())
    if job.server.shards > learned:
        raise too_many(job.server.shards, learned)
    _may_listen(job.server.host, "server.host")
    if job.server.token or job.server.certificate:
        # Here and not above: it imports torch.
        from shoal.sync.server.wire import Credentials

        credentials = Credentials.of(job.server)
        if credentials.tls:
            credentials.context(ssl.Purpose.CLIENT_AUTH)


def _may_listen(host: str, option: str) -> None:
    """Raises JobError for an address that this machine does not have."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
    except OSError as error:
        what = f"{option}={host}: this machine cannot listen there: {error.strerror or error}"
        raise JobError(what, fix=f"{option}: an address that it has (`ip -brief address`)") from None


def _shard(job: Job, args: dict[str, Any], number: int, copy: int) -> Role:
    name = f"server {number}" + (f" copy {copy}" if job.server.copies > 1 else "")
    return Role(name, f"{_ROOM}.hold:main", {**args, "number": number, "copy": copy})


def _local_workers(job: Job) -> int:
    """Workers of this machine; at least one, for measuring and the last validation."""
    assert job.layout is not None
    elsewhere = sum(name.startswith("worker ") for name in job.server.elsewhere)
    return max(1, job.layout.replicas - elsewhere)


def _world(job: Job) -> int:
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


def set_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Of a run that goes on without a server: journal and logs would not follow from its checkpoints any more."""
    before = folder / f"{_FOLDER}-before"
    if (folder / _FOLDER).is_dir():
        shutil.rmtree(before, ignore_errors=True)
        (folder / _FOLDER).rename(before)
        say(f"it goes on from its checkpoint; what a server has journalled since is set aside in {before}")
