"""From a job and a seat to everything a step needs: mesh, replica, update, sync, objective."""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shoal.checkpoint.huggingface import load as load_huggingface
from shoal.data.batch import Batch
from shoal.job import Job
from shoal.mesh import Mesh
from shoal.models import build
from shoal.models.spec import parameters
from shoal.ops.initialise import initialise_
from shoal.optim.update import Update
from shoal.parallel.replica import Replica
from shoal.sync import SYNCS, AllReduce
from shoal.training.objective import Objective
from shoal.training.precision import compute, stored


@dataclass
class Parts:
    """All that one rank needs for a step of a job."""

    job: Job
    mesh: Mesh
    replica: Replica[Batch]
    update: Update
    sync: AllReduce
    objective: Objective


def assemble(job: Job, mesh: Mesh, fresh: bool = True) -> Parts:
    """Builds the model on meta, cuts it, gives it memory and its first weights. `job` has no `auto` left.

    fresh: False where a checkpoint replaces all weights. A folder that they once came from need not exist any more.
    """
    with torch.device("meta"):
        model = build(job.model).to(stored(job.train.precision))
    blocks = list(model.blocks)
    for block in blocks:
        if mesh.layout.recompute == "block":
            _recompute(block)
        if job.train.compile == "on":
            block.compile()
    bucket_bytes = int(job.sync.bucket_mib * 2**20)
    replica: Replica[Batch] = Replica(
        model, blocks, mesh, compute=compute(job.train.precision), bucket_bytes=bucket_bytes
    )
    if fresh:
        first_weights(replica, job)
    update = Update(replica.shards(), job.optim, job.train.steps)
    sync = SYNCS[job.sync.name](mesh, job.optim.clip)
    sync.attach(replica, update)
    return Parts(job, mesh, replica, update, sync, Objective(job.train.precision, job.train.loss_chunk))


def _recompute(block: nn.Module) -> None:
    """Keeps a block's input only and computes the rest again in backward (Chen et al. 2016, arXiv:1604.06174)."""
    forward = types.MethodType(type(block).forward, block)
    # Nothing in a block draws random numbers, so no generator state needs saving.
    block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def first_weights(replica: Replica, job: Job) -> None:
    """Random weights that depend on seed and name, not on the layout; or those of a Hugging Face folder."""
    if job.model.weights:
        load_huggingface(Path(job.model.weights), replica.shards())
        return
    fills = parameters(job.model)
    for shard in replica.shards():
        initialise_(shard.local, shard.name, shard.global_shape, shard.offsets, fills[shard.name].fill, job.train.seed)
