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


def main(seat: Seat, *, folder: str, job: str, prepared: str, started: float) -> dict[str, Any]:
    """Measured on all workers' ranks at a time, as they will compute. Returns the job as TOML.

    The number of steps is that of replicas which all-reduce, a first guess: the coordinator follows the workers' pace.
    """
    given = parse(job)
    say = speaker(Path(folder)) if seat.member == 0 else lambda text: None
    if given.sync.codec == "auto":
        # Where some are on others it is refused.
        say("codec none: workers and servers are all on this machine")
        given = replace(given, sync=replace(given.sync, codec="none"))
    assert given.layout is not None
    plan.placement(given)  # refuses more shards than there are parameters
    batch = replace(given.train, global_batch=pushed_batch(given))
    alike = replace(given, sync=replace(given.sync, name="allreduce"), train=batch)
    with mesh.build(given.layout, seat, timeout=given.sync.timeout) as ranks:
        device.keep_memory(ranks.device, gathering=given.layout.sharers > 1)
        corpus = Prepared.load(Path(prepared))
        training = Loader(corpus, given.data, "train", batch.global_batch, given.train.seed)
        length = None if given.train.steps else length_of(given, corpus, started)
        found = settled(alike, ranks, training, length, say)
    return {"job": write(_as(found, given))}


def _as(found: Job, given: Job) -> Job:
    """What was measured, of the job that was given."""
    codec = replace(given.sync, codec=found.sync.codec)
    train = replace(found.train, global_batch=given.train.global_batch)
    return replace(found, sync=codec, train=train, server=given.server)
