"""Whole runs with a parameter server, in processes of the tests' fork server; and the audit of what they did."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.job import Job, read
from shoal.launch import roles, server
from shoal.launch.pool import Pool
from shoal.launch.train import ready
from shoal.observe import metrics
from shoal.sync.server import journal
from shoal.sync.server import records as r
from shoal.sync.server.messages import COORDINATOR
from shoal.sync.server.node.shard_log import ShardLog
from shoal.sync.server.parameters import Parameters
from shoal.sync.server.shard import ServerShard
from shoal.sync.simulate.audit import exceeded
from shoal.training.precision import stored
from shoal.training.server import hold, plan
from tests.launch import sockets
from tests.training.server.watched import OLD, TOLD

# Seconds for one run, on a machine however busy.
_PATIENCE = 240.0


def run(
    pool: Pool, job: Job, *, resume: bool = False, said: list[str] | None = None, restarts: int = 20,
    network: dict[str, Any] | None = None, dies: dict[str, Any] | None = None, rows: bool = True,
    also: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `shoal train` does with a server job, without its end; gives its figures. Nothing is left of it.

    said: what is said to the user comes in there. restarts: of a role. network: see `watched`, for all roles; dies:
    see there, by role. rows: see there; also: whatever else is there, by role. What hangs is ended with a RankError.
    """
    said = [] if said is None else said
    folder = job.run.dir
    job, arguments = ready(read(Path(folder) / "job.toml") if resume else job, folder if resume else None, time.time())
    real = roles.run

    def watched(ranks: Any, parts: list[roles.Role], **options: Any) -> Any:
        extra = {"network": network} if network else {}
        disturbed = []
        for part in parts:
            if ".trial:" in part.entry:
                disturbed.append(part)
                continue
            more = extra | ({"dies": dies[part.name]} if dies and part.name in dies else {})
            if not rows and part.name.startswith("worker"):
                more = more | {"rows": False}
            more |= (also or {}).get(part.name, {})
            disturbed.append(replace(part, entry=_watched(part.entry), args=part.args | more))
        return real(ranks, disturbed, restarts=restarts, **options)

    with mock.patch.object(roles, "run", watched), _patience():
        try:
            return server.run(job, arguments, pool.start(), said.append, lambda name: None)
        finally:
            left = [pid for name in ("coordinat", "server", "worker") for pid in pids(f"shoal-{name}")]
            assert not left, "processes of the run are left"


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Kills the coordinator of a run that does not end, more often than it is started again."""
    over = threading.Event()

    def end() -> None:
        while not over.wait(0.1):
            for pid in pids("shoal-coordinat"):
                os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(_PATIENCE, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        over.set()
        timer.cancel()


def _watched(entry: str) -> str:
    module = entry.rpartition(":")[0].rpartition(".")[2]
    return f"tests.training.server.watched:{module}"


def pids(name: str, of: int | None = None) -> list[int]:
    """Of live processes below this one, or below another, those whose name begins so."""
    found = []
    for pid in sockets.family(of or os.getpid()):
        try:
            if Path(f"/proc/{pid}/comm").read_text().startswith(name) and sockets.alive(pid):
                found.append(pid)
        except OSError:
            continue
    return found


ALL = "all"


@dataclass
class Killer:
    """Kills one process of a role, or all of all, when so many steps are done, in this order.

    victims: steps, and how its name begins. waits: seconds until the next step was done, of each.
    """

    folder: Path
    victims: list[tuple[int, str]]
    number: signal.Signals = signal.SIGKILL
    waits: list[float] = field(default_factory=list)

    def __enter__(self) -> Killer:
        self._over = False
        self._thread = threading.Thread(target=self._kill, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()

    def _kill(self) -> None:
        for step, name in self.victims:
            if not self._until(lambda step=step: steps(self.folder) >= step):
                return
            rows = steps(self.folder)
            before = time.monotonic()
            names = ["shoal-coordinat", "shoal-server", "shoal-worker"] if name == ALL else [name]
            # One that was killed before is being started again.
            if not self._until(lambda names=names: all(map(pids, names))):
                return
            for pid in [pid for each in names for pid in pids(each)][: None if name == ALL else 1]:
                os.kill(pid, self.number)
            if not self._until(lambda rows=rows: steps(self.folder) > rows):
                return
            self.waits.append(time.monotonic() - before)

    def _until(self, condition: Callable[[], bool]) -> bool:
        while not self._over:
            try:
                if condition():
                    return True
            except (OSError, IndexError):
                pass
            time.sleep(0.005)
        return False


def steps(folder: Path) -> int:
    """Of its metrics' last whole row."""
    rows = metrics.read(folder)
    return rows[-1]["step"] if rows else 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    newest = checkpoint.newest(folder / "checkpoints", print)
    assert newest is not None
    return {name: tensor.clone() for name, tensor in checkpoint.tensors(newest)}


def version(folder: Path) -> int:
    """Of the newest checkpoint."""
    newest = checkpoint.newest(folder / "checkpoints", print)
    assert newest is not None
    return int(manifest.read(newest).values["update"]["updates"])


def history(folder: Path) -> tuple[dict[int, r.Committed], list[r.Rejected]]:
    """All that its journals say was committed, by version, and rejected. They agree where they overlap."""
    commits: dict[int, r.Committed] = {}
    rejected: dict[Any, r.Rejected] = {}
    for records in journals(folder):
        for record in records:
            if isinstance(record, r.Committed):
                assert commits.setdefault(record.version, record) == record, "a version is two"
            elif isinstance(record, r.Rejected):
                assert rejected.setdefault(record.key, record) == record, "a push was decided on twice"
    return commits, list(rejected.values())


def journals(folder: Path) -> list[list[r.AnyRecord]]:
    """From the oldest on; each but the first begins with a summary, and what some before it has, too."""
    here = folder / "server"
    paths = [*sorted(here.glob(f"{OLD}-*")), here / "journal"]
    return [journal.decode(path.read_bytes(), str(path))[0] for path in paths]


def audit(folder: Path, samples: int, first: int = 0) -> list[r.Committed]:
    """Of a run's commits, in their order: none is missing, no push is in two, every sample was used exactly once, and
    what workers were told is so; and nothing was begun or committed that the mode does not allow. samples: used up by
    its end. first: by its beginning."""
    rules = plan.rules(read(folder / "job.toml"))
    for records in journals(folder):
        assert list(exceeded(rules, records)) == []
    commits, rejected = history(folder)
    found = [commits[version] for version in sorted(commits)]
    assert list(commits) == sorted(commits) == list(range(found[0].version, found[0].version + len(found)))
    keys = [key for record in found for key in record.keys]
    assert len(set(keys)) == len(keys), "a push was applied twice"
    used = [samples for record in found for samples in record.samples] + [record.skipped for record in rejected]
    flat = sorted(number for start, stop in used for number in range(start, stop))
    assert flat == list(range(first, samples)), "a sample was used twice, or not at all"
    where = {key: record.version for record in found for key in record.keys}
    told = [line.split() for path in (folder / "server").glob(f"{TOLD}-*") for line in path.read_text().splitlines()]
    assert told, "nobody was told anything"
    for worker, incarnation, clock, accepted, version in (map(int, words) for words in told):
        key = (worker, incarnation, clock)
        assert (where.get(key) == version) if accepted else (key not in where), f"{key} was told what is not so"
    return found


def replayed(
    folder: Path, look: Callable[[int, int, Parameters], object] = lambda shard, version, held: None
) -> dict[str, torch.Tensor]:
    """The weights that follow from the first ones, what is in the shards' logs (`keeps`) and what was committed.

    look: is given each shard and version, with what it holds then. Of parameters that lie whole on one shard.
    """
    job, commits = read(folder / "job.toml"), history(folder)[0]
    found = {}
    for number in range(job.server.shards):
        held = hold.empty(job, number)
        hold.first_weights(held.shards, job)
        shard = ServerShard(number, held)
        log = ShardLog(folder / "server" / f"shard-{number}", stored(job.train.precision))
        shard.recover(log.read())
        log.close()
        for version in sorted(commits):
            shard.handle(COORDINATOR, commits[version].apply(), (), 0.0)
            assert shard.version == version, "the log lacks what was committed"
            look(number, version, held)
        found |= {each.name: each.local for each in held.shards}
    return found
