"""`shoal join`: a part of a job with a parameter server, on another machine than the one that leads it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from shoal.data.prepared import META, Prepared
from shoal.errors import DataError, JobError, ShoalError
from shoal.job import Job, parse, read_run, write
from shoal.job.check import nearest
from shoal.job.machine import FILES, MachineOptions, check_beyond, on_machine
from shoal.launch import roles
from shoal.launch.ranks import Ranks
from shoal.launch.roles import Role
from shoal.launch.server import ENTRIES, FOLDER, START, TRIAL, Start, may_listen, shard, trying, worker
from shoal.observe import commands, result
from shoal.observe.hold import alone, held
from shoal.observe.log import speaker
from shoal.training.folder import DATA, LOCK

# Seconds between two looks for a run that has not begun, and for what it is and whether somebody is at work on it.
_AGAIN, _LOOK = 0.2, 1.0
# Seconds after which a part ends by itself when its run is over and nobody has told it.
_LEFT = 20.0
JOB = "job.toml"
# What stands for a worker on top of those of the job; how one is named, and below what its number is.
MORE, _NUMBER, _MOST = "worker", re.compile(r"worker (0|[1-9]\d{0,3})"), 1000


def join(folder: Path, name: str, own: MachineOptions, patience: float = 60.0) -> str:
    """Takes one part in a run that another machine leads, until the run is over; a worker, or until a first signal.
    Where the run is resumed meanwhile, the part begins anew, by the options that the run has then. Its name.

    folder: the run's, as this machine sees it. name: `worker 2`, `server 0`; a worker beyond those of the job, or
    `worker`, the first of these that nobody is, comes on top of them. own: what this machine has elsewhere, or
    otherwise, than the first. patience: seconds to wait for the run to begin. Raises JobError where there is no such
    run or part, or where something is missing here.
    """
    say, tried, wanted = speaker(), "", name

    def stopping(signal: str) -> None:
        say(f"{signal}: {name} leaves the run after the gradient that it is at; again: at once")

    with contextlib.ExitStack() as ending:
        ranks: Ranks | None = None
        while True:
            start = _wait(folder, patience, tried)
            job = parse(start.job)
            trial = job.sync.codec == "auto"
            if trial and _beyond(job, wanted):
                # The codec is chosen by the links of the job's own parts.
                tried = start.nonce
                continue
            with _taken(folder, _names(folder, wanted, job)) as name:
                part = _part(folder, name, own, start)
                if ranks is None:
                    ranks = Ranks(ENTRIES)
                    ending.callback(ranks.close)
                if trial:
                    say(f"{name} of {folder}: the links between machines are tried")
                leaves = name.startswith("worker ") and not trial
                ended = _ends(ranks, trying(part) if trial else part, say, stopping if leaves else None, start, folder)
            if not ended:
                say(f"the run was resumed on its first machine: {name} begins anew")
            elif trial:
                tried = start.nonce
            else:
                return name


@contextlib.contextmanager
def _taken(folder: Path, names: list[str]) -> Iterator[str]:
    """Holds the first of these parts that nobody else has, and gives its name. JobError where there is none."""
    for name in names:
        last = name == names[-1]
        taken = JobError(f"another process is {name} of this run", where=str(folder), fix="end that `shoal join` first")
        with contextlib.ExitStack() as holding:
            try:
                # Where there are others to be had, nobody is waited for.
                path = folder / FOLDER / f"{name.replace(' ', '-')}{LOCK}"
                holding.enter_context(alone(path, taken, patience=1.0 if last else 0.0))
            except JobError:
                if last:
                    raise
                continue
            yield name
            return


def _names(folder: Path, wanted: str, job: Job) -> list[str]:
    """The parts of the run that are meant, any of which another machine may take. JobError where there are none."""
    assert job.layout is not None
    if wanted == MORE:
        return [f"worker {number}" for number in range(job.layout.replicas, _MOST)]
    if wanted in job.server.elsewhere or _beyond(job, wanted):
        return [wanted]
    what = f"this run has no part '{wanted}' for another machine"
    fix = "the run's first machine starts it, unless --server.elsewhere names it when the run is begun or resumed"
    if job.server.elsewhere:
        fix = nearest(wanted, list(job.server.elsewhere))
    raise JobError(what, where=str(folder), fix=f"{fix}; or `shoal join {folder} {MORE}`, for a worker more")


def _beyond(job: Job, name: str) -> bool:
    """Whether this is a worker that comes on top of those of the job."""
    assert job.layout is not None
    number = _NUMBER.fullmatch(name)
    return name == MORE or (number is not None and job.layout.replicas <= int(number[1]) < _MOST)


def _ends(
    ranks: Ranks, part: Role, say: Callable[[str], None], stopping: Callable[[str], None] | None, start: Start,
    folder: Path,
) -> bool:  # fmt: skip
    """Runs this part; False where it was killed because the run was resumed meanwhile. True too where nobody told it
    that the run is over, as when it came just then.

    As after kill -9 nothing is lost: a server's log has what it has acknowledged, and a gradient that was not is
    computed again.
    """
    resumed, over = partial(_resumed, folder, start.nonce), _over(folder)
    try:
        roles.run(ranks, [part], say=say, on_signal=stopping, superseded=lambda: resumed() or over())
    except roles.Superseded:
        if resumed():
            return False
        say(f"the run is over: {part.name} ends")
    except ShoalError:
        # Of a start that is over anything may fail.
        if not resumed():
            raise
        return False
    return True


def _over(folder: Path) -> Callable[[], bool]:
    """Whether the run has been over for a while, as nobody is at work on it and it has all its steps. A first machine
    that was killed leaves none of that behind, and its parts wait until it is resumed."""
    since = math.inf

    def asked() -> bool:
        nonlocal since
        done = None if held(folder) else result.read(folder)
        steps = read_run(folder).train.steps if done is not None else 0
        over = done is not None and result.state(done, steps) == "finished"
        since = min(since, time.monotonic()) if over else math.inf
        return time.monotonic() - since > _LEFT

    return asked


def _resumed(folder: Path, nonce: str) -> bool:
    """Whether there is a later start of the run than this one, or the trial of links before it. Where nothing can be
    read, the first machine is about to write it, or the folder is not there for a moment."""
    for name in (START, TRIAL):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            if msgspec.json.decode((folder / FOLDER / name).read_bytes(), type=Start).nonce != nonce:
                return True
    return False


def _part(folder: Path, name: str, own: MachineOptions, start: Start) -> Role:
    """This part of the run. JobError where it cannot be had here."""
    job, where = parse(start.job), str(folder.absolute())
    if _beyond(job, name):
        check_beyond(job)
    paths = {key: os.path.abspath(os.path.expanduser(path)) for key in ("data", *FILES) if (path := getattr(own, key))}
    job, number = on_machine(job, name, replace(own, **paths)), int(name.split()[1])
    _check_files(job)
    told = {"folder": where, "job": write(job), "nonce": start.nonce}
    if name.startswith("server "):
        may_listen(job.server.host, "--host")
        return shard(job, {**told, "joined": True}, number)
    told["prepared"] = _prepared(folder, Path(start.prepared), paths.get("data", ""))
    return worker(job, {**told, "leaves": True, "micro_batch": own.micro_batch}, number)


def _check_files(job: Job) -> None:
    """Raises JobError for a file by which machines trust each other that this one does not have."""
    for name in FILES:
        path, fix = getattr(job.server, name), f"name this machine's own by --{name} FILE"
        if name == "token":
            fix = (
                "copy the first machine's file, and name the copy by --token FILE; or resume the run there with "
                "--server.token in a folder that all machines see"
            )
        try:
            if path:
                Path(path).open("rb").close()
        except OSError as error:
            what = f"this machine cannot read server.{name}={path}: {error.strerror}"
            raise JobError(what, fix=fix) from None


def _prepared(folder: Path, usual: Path, given: str) -> str:
    """Where this machine has the run's prepared text. usual: where the first one does. given: --data."""
    places = [Path(given) / usual.name, Path(given)] if given else [usual]
    place = next((place for place in places if (place / META).is_file()), None)
    fix = "name a folder with a copy of it by --data; or begin a run with --data.cache in one that all machines see"
    if place is None:
        raise DataError("this machine does not have the run's prepared text", where=str(places[0]), fix=fix)
    known = msgspec.json.decode((folder / DATA).read_bytes(), type=dict[str, str])
    if Prepared.load(place).fingerprint != known["fingerprint"]:
        raise DataError("this is another text than the one that the run trains on", where=str(place), fix=fix)
    return str(place)


def _wait(folder: Path, patience: float, tried: str) -> Start:
    """What the run's first machine has written, once it has. tried: the start whose links have been tried already.

    JobError where nothing is to be waited for, or nothing has come.
    """
    looked, since = float("-inf"), time.monotonic()
    if (start := _begun(folder, tried)) is None:
        _can_begin(folder)
        waits = f"waits up to {patience:g} s for the run's first machine to begin it"
        speaker()("links were tried; waits for training to begin" if tried else waits)
    while start is None:
        now = time.monotonic()
        if now - looked >= min(_LOOK, patience / 2):
            # After the trial it is on its way for as long as its first machine is there.
            looked, since = now, now if tried and held(folder) else since
            _can_begin(folder)
        if now - since > patience:
            _can_begin(folder, changing=False)
            what = f"no run with a parameter server goes on here, nor has one begun within {patience:g} s"
            fix = f"start `shoal train --sync server --run-dir {folder}` first"
            if (folder / JOB).is_file():
                fix = f"`{commands.resume(folder)}` on the run's first machine, then `shoal join` again"
            raise JobError(what, where=str(folder), fix=fix)
        time.sleep(_AGAIN)
        start = _begun(folder, tried)
    return start


def _can_begin(folder: Path, changing: bool = True) -> None:
    """Raises JobError for a run that nobody can join, and that will not become one as it is.

    changing: whoever is at work on it may be making another one of it.
    """
    if not (folder / JOB).is_file() or (changing and held(folder)):
        return
    job = read_run(folder)
    if job.sync.name != "server":
        what = f"this run has no parameter server: its sync is {job.sync.name}"
        raise JobError(what, where=str(folder), fix="a part can be joined of a run with --sync server")
    done = result.read(folder)
    if done is not None and result.state(done, job.train.steps) == "finished":
        what = f"this run is over: it has trained its {done.steps:,} steps"
        fix = f"for more, `{commands.resume(folder)} --steps {2 * done.steps}` on its first machine, then join"
        raise JobError(what, where=str(folder), fix=fix)


def _begun(folder: Path, tried: str) -> Start | None:
    """Of a run, or of the trial before it."""
    for name in (START, TRIAL):
        path = folder / FOLDER / name
        try:
            start = msgspec.json.decode(path.read_bytes(), type=Start)
        except FileNotFoundError:
            continue
        except msgspec.DecodeError:
            raise JobError(f"the run's {name} is damaged", where=str(path), fix="start the run again") from None
        if name == START or start.nonce != tried:
            return start
    return None
