"""Before a server job's processes start: whether journal and logs of an earlier start of the run still hold."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from shoal import checkpoint
from shoal.checkpoint import manifest
from shoal.job import Job, parse
from shoal.mesh import Seat
from shoal.observe import files
from shoal.observe.log import speaker
from shoal.sync import saved
from shoal.sync.server import journal
from shoal.sync.server import records as r
from shoal.sync.server.messages import Range
from shoal.sync.server.node.book import FOLDER
from shoal.sync.server.node.journal_file import FILE, JournalFile
from shoal.sync.server.standing import Standing
from shoal.training import folder as folders
from shoal.training.server import hold, plan
from shoal.training.worker import newest_whole, refuse_fewer

_PLAN = "plan.json"


def main(seat: Seat, *, folder: str, job: str) -> None:
    """Leaves in the run's folder what coordinator and shards go on from, and nothing else of theirs.

    With logs on a disk (one copy of each shard) every acknowledged update is there, also those since the newest
    checkpoint; otherwise, or where shards hold other parts than before, the run goes on from that checkpoint. Raises
    CheckpointError or JobError where it cannot; then every file is as it was.
    """
    run, given = Path(folder), parse(job)
    say, here = speaker(run), run / FOLDER
    lasting = _lasting(given)
    before = (here / _PLAN).read_bytes() if (here / _PLAN).is_file() else b""
    records = _journal(here)
    base, newest = _versions(records)
    start = _start(run, given, say)
    fits = before == lasting and given.server.copies == 1 and base <= start <= newest
    if fits and not given.endless:
        copies = [given.server.copies] * given.server.shards
        used = Standing(plan.rules(given), copies, None, records, 0.0).samples.used
        refuse_fewer(run, used // given.train.global_batch, given)
    if not fits and here.exists():
        _clear(here)
        if newest > start:
            say(f"{newest - start:,} updates since the checkpoint are computed again: shards are other ones now")
    elif fits and newest > start:
        say(f"the journal of this run goes on after its checkpoint: version {start:,} → {newest:,}")
    if fits:
        _anew(here)
    here.mkdir(parents=True, exist_ok=True)
    # A coordinator that is started again reads it.
    folders.write_job(run, given)
    files.replace(here / _PLAN, lasting)


def check(seat: Seat, *, folder: str, job: str) -> None:
    """Raises what `main` would of the newest checkpoint, before a codec is chosen. Writes nothing."""
    given = parse(job)
    _start(Path(folder), replace(given, sync=replace(given.sync, codec="none")), lambda text: None)


def _clear(here: Path) -> None:
    """Leaves the locks of `shoal join`, which are of parts that live on and begin anew: under another file of that name
    somebody else could take the same part."""
    for path in here.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.suffix != folders.LOCK:
            path.unlink()


def _anew(here: Path) -> None:
    """Into the journal, before anybody joins: whoever was in the run before is gone, and all workers are waited for."""
    with contextlib.closing(JournalFile(here)) as told:
        told.append([r.Anew()], durable=True)


def _lasting(job: Job) -> bytes:
    """What logs and journal only hold for. Rates are in the journal."""
    held = [[(block.name, block.start, block.stop) for block in blocks] for blocks in plan.placement(job)]
    optim, options = plan.optim(job), job.server
    return msgspec.json.encode(
        {
            "model": plan.model_hash(job), "placement": held, "copies": options.copies, "codec": job.sync.codec,
            "local_steps": options.local_steps, "compensation": options.compensation,
            "optim": [getattr(optim, name) for name in ("name", "betas", "eps", "momentum", "weight_decay")],
        }
    )  # fmt: skip


def _journal(here: Path) -> list[r.AnyRecord]:
    """All its records; empty where there is none."""
    path = here / FILE
    return journal.decode(path.read_bytes(), where=str(path))[0] if path.is_file() else []


def _versions(records: Sequence[r.AnyRecord]) -> tuple[int, int]:
    """Between which there is a journal; none: (1, 0)."""
    if not records:
        return 1, 0
    first = records[0]
    assert isinstance(first, r.Opened), "a journal begins with what was opened"
    return first.version, first.version + sum(isinstance(record, r.Committed) for record in records)


def _start(run: Path, job: Job, say: Callable[[str], None]) -> int:
    """The version that the newest checkpoint holds, which is known to be all that shards go on from."""
    newest = newest_whole(run, say)
    if newest is None:
        return 0
    what = manifest.read(newest)
    if not job.endless:
        refuse_fewer(run, what.step, job)
    for number in range(job.server.shards):
        checkpoint.fit(newest, hold.wanted(hold.empty(job, number, "meta"), what))
    if why := saved.begins_anew(what.values, plan.rules(job).outer):
        say(why)
    return hold.version_of(what.values)


def opened_at(run: Path, job: Job) -> r.Opened:
    """Where a journal begins: at the newest checkpoint, or at nothing."""
    newest = checkpoint.newest(run / "checkpoints", lambda text: None)
    if newest is None:
        return r.Opened(plan.model_hash(job))
    values = manifest.read(newest).values
    told = values.get("sync", {})
    used = tuple(Range(*pair) for pair in told.get("exceptions", ()))
    return r.Opened(plan.model_hash(job), hold.version_of(values), values["position"], used)
