"""What every process of a server job derives from the job alone, and therefore alike."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import msgspec

from shoal.job import Job
from shoal.job.optim import OptimOptions
from shoal.job.server import pushed_batch
from shoal.models.spec import parameters
from shoal.sync.server.messages import Address
from shoal.sync.server.node.book import Book, own_token
from shoal.sync.server.node.station import Station
from shoal.sync.server.placement import Block, of_job
from shoal.sync.server.rules import Rules
from shoal.sync.server.wire import Credentials
from shoal.training.precision import stored

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def of_worker(job: Job, micro_batch: int = 0) -> Job:
    """The job as one worker computes it: a single replica. micro_batch: this one's own, 0 = the layout's."""
    assert job.layout is not None
    own = micro_batch or job.layout.micro_batch
    return replace(job, layout=replace(job.layout, replicas=1, replica_share="", micro_batch=own))


def unit(job: Job) -> int:
    """Samples in a micro-batch of a worker, over all of its ranks: it is granted whole ones."""
    layout = job.layout
    assert layout is not None
    part = pushed_batch(job) // layout.pieces
    return (layout.micro_batch or part) * layout.fsdp


def share(job: Job, worker: int) -> int:
    """Micro-batches that a worker pushes at a time."""
    return step_share(job, worker) * job.server.local_steps


def step_share(job: Job, worker: int) -> int:
    """Micro-batches that a worker computes a gradient from: as its `replica_share` is.

    One that joins beyond the job's own workers computes as many as the one of these that computes fewest.
    """
    assert job.layout is not None
    shares = job.layout.shares
    part = shares[worker] if worker < len(shares) else min(shares)
    return pushed_batch(job) * part // sum(shares) // unit(job)


def optim(job: Job) -> OptimOptions:
    """What servers update weights with: the job's optimizer, or an outer one where workers take steps of their own."""
    if job.server.local_steps == 1:
        return job.optim
    return OptimOptions(
        name="sgd", lr=job.sync.outer_lr, momentum=job.sync.momentum, weight_decay=0.0, schedule="constant", warmup=0.0,
        clip=0.0,
    )  # fmt: skip


def samples(job: Job, steps: int) -> int:
    """Of so many steps, rounded up to whole micro-batches."""
    return -(-steps * job.train.global_batch // unit(job)) * unit(job)


def rules(job: Job) -> Rules:
    assert job.layout is not None
    return Rules.of(
        job.server, workers=job.layout.replicas, micro_batch=unit(job), clip=optim(job).clip, codec=job.sync.codec,
        feedback=job.sync.feedback,
    )  # fmt: skip


def placement(job: Job) -> list[list[Block]]:
    """Which server shard holds what."""
    return of_job(job)


def model_hash(job: Job) -> str:
    """Of names and shapes of all parameters, and of what else changes what they compute."""
    shapes = {name: spec.shape for name, spec in parameters(job.model).items()}
    told = {**vars(job.model), "weights": "", "shapes": shapes, "precision": stored(job.train.precision).itemsize}
    return hashlib.blake2b(msgspec.json.encode(told, order="sorted"), digest_size=8).hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """Of the tokenizer's files in a run folder."""
    digest = hashlib.blake2b(digest_size=8)
    for name in _TOKENIZER:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def credentials(job: Job, run: Path) -> Credentials:
    """With the run's own token where the job names none. JobError where token or TLS files cannot be read."""
    found = Credentials.of(job.server)
    return found if found.token else replace(found, token=own_token(run))


def station(job: Job, run: Path, me: Address, calls: tuple[str, ...], nonce: str | None) -> Station:
    """A mailbox for this role. nonce: of its start of the run, as in `Book`. JobError where token or TLS files cannot
    be read."""
    return Station(me, Book(run, nonce), credentials(job, run), stored(job.train.precision), calls)
