"""From a job and a seat to everything a step needs: mesh, replica, update, sync, objective."""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.checkpoint.huggingface import load as load_huggingface
from shoal.data.batch import Batch
from shoal.job import Job
from shoal.mesh import Mesh
from shoal.models import build
from shoal.models.moe import MoE, Row
from shoal.models.spec import parameters
from shoal.ops.initialise import initialise_
from shoal.optim.update import Update
from shoal.parallel.context import Context
from shoal.parallel.expert import ExpertAxis, Rows
from shoal.parallel.pieces import Part
from shoal.parallel.replica import Replica
from shoal.parallel.stages import layers_of_stages
from shoal.parallel.tensor import Tensors
from shoal.sync import Sync
from shoal.sync import build as build_sync
from shoal.training.objective import Objective
from shoal.training.precision import compute, stored


@dataclass
class Parts:
    """All that one rank needs for a step of a job."""

    job: Job
    mesh: Mesh
    replica: Replica[Batch]
    update: Update
    sync: Sync
    objective: Objective


def assemble(job: Job, mesh: Mesh, fresh: bool = True) -> Parts:
    """Builds the model on meta, cuts it, gives it memory and its first weights. `job` has no `auto` left.

    fresh: False where a checkpoint replaces all weights. A folder that they once came from need not exist any more.
    """
    replica, objective = spread(job, mesh, fresh)
    update = Update(replica.shards(), job.optim, job.train.steps, mesh)
    sync = build_sync(job, mesh)
    sync.attach(replica, update)
    return Parts(job, mesh, replica, update, sync, objective)


def spread(job: Job, mesh: Mesh, fresh: bool = True) -> tuple[Replica[Batch], Objective]:
    """The model with its first weights, cut for this rank, and what is minimised. As for `assemble`."""
    assert job.layout is not None
    layers = layers_of_stages(job.model, job.layout, job.data.sequence_length)
    axes = Axes.of(job, mesh)
    parts = {stage: part_of(job, layers[stage], axes) for stage in mesh.layout.stages_of(mesh.stage)}
    precision, bucket_bytes = job.train.precision, int(job.sync.bucket_mib * 2**20)
    replica: Replica[Batch] = Replica(
        parts, mesh, compute=compute(precision), bucket_bytes=bucket_bytes, hidden=partial(hidden_of, job)
    )
    if fresh:
        first_weights(replica, job)
    return replica, objective_of(job, axes)


@dataclass
class Axes:
    """How this rank shares matrices, sequences and experts with others; None where it has them whole."""

    tensors: Tensors | None
    context: Context | None
    experts: ExpertAxis | None
    row: Row | None

    @classmethod
    def of(cls, job: Job, mesh: Mesh) -> Axes:
        layout = mesh.layout
        ring = layout.tensor_by == "ring"
        tensors = Tensors(job.model, mesh.group("tensor"), ring=ring) if layout.tensor > 1 else None
        context = Context(mesh.group("context"), layout.context_by) if layout.context > 1 else None
        experts = ExpertAxis(mesh) if layout.expert > 1 else None
        row = Rows(mesh, context, tensors) if context is not None or tensors is not None else None
        return cls(tensors, context, experts, row)


def objective_of(job: Job, axes: Axes) -> Objective:
    train, context, tensors = job.train, axes.context, axes.tensors
    rates = {"dropout": train.dropout, "attention_dropout": train.attention_dropout}
    return Objective(train.precision, train.loss_chunk, context, tensors, seed=train.seed, **rates)


def hidden_of(job: Job, batch: Batch) -> Tensor:
    """On meta, what one stage hands to the next: of each sequence the positions whose residual stream is here."""
    assert job.layout is not None
    seen = job.data.sequence_length // job.layout.context // job.layout.tensor
    dtype = stored(job.train.precision)
    return torch.empty(batch.tokens_BL.shape[0], seen, job.model.hidden_size, dtype=dtype, device="meta")


def part_of(job: Job, layers: range, axes: Axes) -> Part:
    """These blocks of the model, on meta, as this rank computes them."""
    assert job.layout is not None
    with torch.device("meta"):
        model = build(job.model, layers).to(stored(job.train.precision))
    cuts = axes.tensors.split(model) if axes.tensors is not None else {}
    of_experts, experts = axes.experts.split(model) if axes.experts is not None else ({}, [])
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.row = axes.row
    for block in model.blocks:
        if job.layout.recompute == "block":
            _recompute(block)
        if job.train.compile == "on":
            block.compile()
    ends = layers.start == 0 or layers.stop == job.model.num_hidden_layers
    tied = job.model.tie_word_embeddings and job.layout.pipeline > 1 and ends
    shared = ["model.embed_tokens.weight"] if tied else []
    return Part(model, model.blocks, cuts | of_experts, shared, experts, in_order=True)


def _recompute(block: nn.Module) -> None:
    """Keeps a block's input only and computes the rest again in backward (Chen et al. 2016, arXiv:1604.06174)."""
    forward = types.MethodType(type(block).forward, block)
    # Nothing in a block draws random numbers, so no generator state needs saving.
    block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def first_weights(replica: Replica, job: Job) -> None:
    """Random weights that depend on seed and name, not on the layout; or those of a Hugging Face folder."""
    if job.model.weights:
        load_huggingface(Path(job.model.weights), replica.held())
        return
    fills = parameters(job.model)
    for shard in replica.held():
        initialise_(shard.local, shard.name, shard.global_shape, shard.offsets, fills[shard.name].fill, job.train.seed)
