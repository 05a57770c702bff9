"""Before the first update: every `auto` of the job decided, and how long it will be if only minutes are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal import device, mesh
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import Job, parse, write
from shoal.job.server import pushed_batch
from shoal.mesh import Seat
from shoal.observe.log import speaker
from shoal.training.server import plan
from shoal.training.worker import length_of, settled

# Steps between validations and between checkpoints of a run without an end; and minutes that it may be taken to last.
_ENDLESS, _DAY = 100, 24.0 * 60


def main(seat: Seat, *, folder: str, job: str, prepared: str, started: float) -> dict[str, Any]:
    """Measured on all workers' ranks at a time, as they will compute. Returns the job as TOML.

    Only the codec of a job with parts on other machines stays `auto`, until these are there (`trial`). The number of
    steps is that of replicas which all-reduce, a first guess: the coordinator follows the workers' pace. A job without
    an end keeps 0.
    """
    given = parse(job)
    say = speaker(Path(folder)) if seat.member == 0 else lambda text: None
    if given.sync.codec == "auto" and not given.server.elsewhere:
        say("codec none: workers and servers are all on this machine")
        given = replace(given, sync=replace(given.sync, codec="none"))
    assert given.layout is not None
    plan.placement(given)  # refuses more shards than there are parameters
    alike = _alike(given)
    with mesh.build(given.layout, seat, timeout=given.sync.timeout) as ranks:
        device.keep_memory(ranks.device, gathering=given.layout.sharers > 1)
        corpus = Prepared.load(Path(prepared))
        training = Loader(corpus, alike.data, "train", alike.train.global_batch, given.train.seed)
        length = None if given.train.steps or given.endless else length_of(given, corpus, started)
        found = settled(alike, ranks, training, length, say)
    return {"job": write(_as(found, given))}


def _alike(job: Job) -> Job:
    """Whose replicas compute what the workers do, of the text that there is now, over and over."""
    train, every = replace(job.train, global_batch=pushed_batch(job)), job.checkpoint.every
    if job.endless:
        # A share of its length would be none: so often, and whatever saves time pays.
        train = replace(train, validate_every=train.validate_every or _ENDLESS, minutes=_DAY)
        every = every or _ENDLESS
    assert job.layout is not None
    # All-reduce of one replica sends nothing; its worker does.
    codec = "none" if job.sync.codec == "auto" or job.layout.replicas == 1 else job.sync.codec
    sync, saved = replace(job.sync, name="allreduce", codec=codec), replace(job.checkpoint, every=every)
    return replace(job, sync=sync, train=train, data=replace(job.data, grow=False), checkpoint=saved)


def _as(found: Job, given: Job) -> Job:
    """What was measured, of the job that was given."""
    train = replace(found.train, global_batch=given.train.global_batch, minutes=given.train.minutes)
    return replace(found, sync=given.sync, train=train, data=given.data, server=given.server)
