"""Weights out of a server job while it trains: all of one version, as a folder that everything else reads."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from shoal import checkpoint
from shoal.checkpoint import Saver, folders, hf_folder
from shoal.checkpoint.stage import staged
from shoal.errors import CheckpointError, JobError, RankError
from shoal.job import Job, read
from shoal.models.spec import parameters
from shoal.observe.hold import held
from shoal.shard import Shard, State
from shoal.sync.server import journal
from shoal.sync.server import records as r
from shoal.sync.server.messages import COORDINATOR, Address
from shoal.sync.server.node.book import FOLDER, Book
from shoal.sync.server.node.journal_file import FILE
from shoal.sync.server.node.read import Read, Reader
from shoal.sync.server.standing import Standing
from shoal.training.folder import PULLED as NOTE
from shoal.training.server import plan

# In a run's folder, where pulled weights go that are to go nowhere else.
PULLED = "pulled"
# Reads, if a checkpoint has just made the journal forget the version.
_TRIES = 3
# Seconds for a sign of life.
_LIFE = 2.0


@dataclass(frozen=True)
class Pulled:
    """folder: laid out as a run's, of which `checkpoint` is the only one. step: global batches used up by `version`,
    and position: the sample below which all are. new: False where an earlier pull had left the same there."""

    folder: Path
    checkpoint: Path
    version: int
    step: int
    position: int
    new: bool = True


def pull(run: Path, to: Path | None, say: Callable[[str], None]) -> Pulled:
    """Writes the master weights of one version of a running server job into the new folder `to`.

    to: None = `pulled/version-00000123` in the run's, where the same weights may be already; what is damaged of them
    is written again. What is in it: job.toml, tokenizer, and a checkpoint of weights alone, without the optimizer's
    state. The weights are in memory twice meanwhile. say: gets a sentence where somebody is waited for.
    Raises JobError for a run that is none, is not live, or whose token is another; CheckpointError for a folder that
    exists or cannot be written, or has other weights of this version; RankError where a server does not answer.
    """
    job = _job(run)
    if to is not None and (to.exists() or to.is_symlink()):
        raise CheckpointError("is there already", where=str(to), fix="name another folder")
    try:
        station = plan.station(job, run, Address("reader"), ("coordinator", "shard"), nonce=None)
    except OSError as error:
        fix = "do it as the user whose run it is"
        raise JobError(f"the run's token cannot be read: {error.strerror}", where=str(run), fix=fix) from None
    with station:
        for _ in range(_TRIES):
            found = Reader(station, say).read()
            if (at := standing(run, job, found.version)) is not None:
                break
        else:
            raise RankError("checkpoints made the journal forget each version", where=str(run), fix="try again")
    return deliver(run, job, found, at, to)


def deliver(run: Path, job: Job, found: Read, at: Standing, to: Path | None) -> Pulled:
    """Writes what was read, as `pull` says. at: the coordinator at that version."""
    out = to or run / PULLED / f"version-{found.version:08d}"
    if to is None and out.is_dir():
        if _same(out, job, found):
            return replace(_pulled(out, found, at, job), new=False)
        shutil.rmtree(out)
    return _written(run, job, found, at, out)


def _job(run: Path) -> Job:
    """Of a run that can be pulled from, now."""
    newest = f"the newest checkpoint of a run: `shoal ckpt show {run}`, `shoal ckpt export-hf {run} OUT`"
    if not (run / "job.toml").is_file():
        raise JobError("there is no run in this folder", where=str(run), fix="`shoal runs` lists the runs")
    job = read(run / "job.toml")
    if job.sync.name != "server":
        what = f"sync.name={job.sync.name}: only a parameter server gives weights away while it trains"
        raise JobError(what, where=str(run), fix=newest)
    entry = Book(run).find(COORDINATOR)
    live = held(run)
    if entry is not None and not live:
        # Where file systems know no locks, and on other machines, only its port tells.
        try:
            socket.create_connection((entry.host, entry.port), _LIFE).close()
            live = True
        except OSError:
            pass
    if not live:
        raise JobError("nobody trains in this run now", where=str(run), fix=newest)
    if entry is None:
        raise JobError("its coordinator has not started yet", where=str(run), fix="wait for the first step")
    return job


def standing(run: Path, job: Job, version: int) -> Standing | None:
    """What the coordinator was at when it committed `version`, by the run's journal; None where that begins later.

    Whatever the shards have applied is in it: the coordinator tells them of nothing before.
    """
    path = run / FOLDER / FILE
    records = journal.decode(path.read_bytes(), where=str(path))[0]
    for i, record in enumerate(records):
        if isinstance(record, r.Opened | r.Committed) and record.version == version:
            copies = [job.server.copies] * job.server.shards
            return Standing(plan.rules(job), copies, None, records[: i + 1], 0.0)
    return None


def _same(out: Path, job: Job, found: Read) -> bool:
    """Whether an earlier pull of this version is there and whole. Raises CheckpointError where its weights are others:
    the run has gone back before this version and come to it again by another way."""
    known = checkpoint.newest(out / "checkpoints", lambda text: None)
    whole = all((out / name).is_file() for name in ("job.toml", NOTE))
    if known is None or not whole:
        return False
    parts: dict[str, list[Shard]] = {}
    for shard in _shards(job, found):
        parts.setdefault(shard.name, []).append(shard)
    saved = checkpoint.tensors(known, parts, verified=True)
    if all(torch.equal(part.local, _cut(tensor, part)) for name, tensor in saved for part in parts[name]):
        return True
    what = f"has other weights of version {found.version:,}: the run has gone back since they were pulled"
    raise CheckpointError(what, where=str(out), fix="name another folder with --to, or remove this one")


def _cut(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The part of a tensor that a shard has."""
    return whole[tuple(slice(start, start + n) for start, n in zip(shard.offsets, shard.local.shape, strict=True))]


def _pulled(out: Path, found: Read, at: Standing, job: Job) -> Pulled:
    step = at.samples.used // job.train.global_batch
    newest = out / "checkpoints" / folders.name_of(step)
    return Pulled(out, newest, found.version, step, at.samples.state()[0])


def _written(run: Path, job: Job, found: Read, at: Standing, out: Path) -> Pulled:
    pulled, (watermark, exceptions) = _pulled(out, found, at, job), at.samples.state()
    values = {
        "step": pulled.step,
        "position": watermark,
        "update": {"updates": found.version},
        "sync": {"kind": "server", "exceptions": [list(used) for used in exceptions]},
        "layout": str(job.layout),
    }
    with staged(out) as draft:
        for name in ("job.toml", *hf_folder.TOKENIZER_FILES, hf_folder.GENERATION):
            if (run / name).is_file():
                shutil.copyfile(run / name, draft / name)
        (draft / NOTE).write_bytes(msgspec.json.encode({"run": str(run.absolute()), "version": found.version}))
        with Saver(draft / "checkpoints", 0, 1, 1, nonce="pull") as saver:
            pending = saver.save(State(_shards(job, found), values), pulled.step)
            pending.wait()
            if (error := pending.error) is not None:
                raise error
    return pulled


def _shards(job: Job, found: Read) -> list[Shard]:
    shapes = {name: spec.shape for name, spec in parameters(job.model).items()}
    shards = [
        Shard(piece.name, shapes[piece.name], piece.offsets, tensor)
        for told, tensors in found.parts
        for piece, tensor in zip(told.pieces, tensors, strict=True)
    ]
    assert {shard.name for shard in shards} == shapes.keys(), "the shards hold all parameters between them"
    return shards
