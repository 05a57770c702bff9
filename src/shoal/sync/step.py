"""What every way of keeping replicas consistent does in a step: gradients normalised, clipped, applied."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.mesh import Mesh
from shoal.optim.norm import sum_of_squares
from shoal.optim.update import Update
from shoal.parallel.replica import Replica, Tally
from shoal.shard import Shard


@dataclass(frozen=True)
class Version:
    """Which weights a step computes its gradients from: the number of updates in them."""

    number: int


@dataclass(frozen=True)
class Outer:
    """An outer step, in which replicas that had trained apart came together; the same on every rank.

    loss: mean over the tokens of all replicas since the one before. tokens: how many these were. drift: how far a
    replica had moved from the common weights, root mean square over replicas. common: how far their mean had; as
    far as the drift where all moved alike, its part 1/√replicas where each went a way of its own.
    """

    loss: float
    tokens: float
    drift: float
    common: float


@dataclass(frozen=True)
class Applied:
    """What became of one step, the same on every rank; while replicas train apart, on every rank of a replica.

    applied: False where loss or gradient was not finite. loss_sum, weight: over the global batch, or a replica's part.
    tokens: of the global batch; of a replica's part, times the replicas. grad_norm: of the normalised gradient, before
    clipping. staleness: updates between pull and commit. stop: some rank asked to end the run after this step.
    waited: seconds this rank waited for others and the network, not covered by computing. waits: seconds that each
    replica waited for others, where they have told each other of it in this step: with all-reduce, of the one before.
    whence: where it was not finite, e.g. `weights of rank 2`; empty where only the gradient was.
    """

    applied: bool
    version: Version
    loss_sum: float
    weight: float
    tokens: float
    grad_norm: float
    lr: float
    staleness: int = 0
    stop: bool = False
    waited: float = 0.0
    waits: tuple[float, ...] = ()
    whence: str = ""
    outer: Outer | None = None


@dataclass(frozen=True)
class Updated:
    """finite: whether the update was applied. norm: before clipping. lr: 0 where not applied. waited: in seconds."""

    finite: bool
    norm: float
    lr: float
    waited: float


def apply(
    replica: Replica[Any],
    update: Update,
    shards: list[Shard],
    clip: float,
    loss_sum: float,
    weight: float,
    counting: dist.ProcessGroup | None,
    rate: float,
) -> Updated:
    """Divides the gradient sums in the shards by the weight, clips and applies them; on all ranks of a replica.

    clip: largest norm, 0 = none. counting: the ranks whose batches the step was of, None = this one alone. rate: the
    learning rate.
    """
    squares = sum_of_squares(shards)
    waited = sum_within(replica.mesh, squares)
    norm = math.sqrt(squares.item()) / weight if weight else math.nan
    finite = math.isfinite(norm) and math.isfinite(loss_sum)
    lr = 0.0
    if finite:
        scale = min(1.0, clip / norm) if clip and norm else 1.0
        lr = update.apply(scale / weight, rate)
        replica.updated(counting)
    return Updated(finite, norm, lr, waited)


@dataclass(frozen=True)
class OwnStep:
    """A step that a replica takes alone. loss_sum, weight: over its batches; counted: this rank's part of both."""

    done: Updated
    loss_sum: float
    weight: float
    counted: Tensor
    stop: bool
    waited: float


def own_step(mesh: Mesh, replica: Replica[Any], update: Update, clip: float, tally: Tally, rate: float) -> OwnStep:
    """From gradients to the update within one replica, on all of its ranks. rate: as in `apply`."""
    totals = totals_of(tally.loss_sum, tally.weight, tally.stop)
    counted = totals[:2].clone()
    waited = sum_within(mesh, totals)
    loss_sum, weight, stop = totals.tolist()
    start = time.perf_counter()
    shards = replica.collect()
    waited += time.perf_counter() - start
    within = mesh.within_replica if mesh.layout.ranks_per_replica > 1 else None
    done = apply(replica, update, shards, clip, loss_sum, weight, within, rate)
    return OwnStep(done, loss_sum, weight, counted, stop > 0, waited + done.waited)


def no_step(tally: Tally, lr: float) -> OwnStep:
    """Of a replica that does not take this one."""
    nothing = torch.stack([tally.loss_sum, tally.weight])
    return OwnStep(Updated(True, math.nan, lr, 0.0), 0.0, 0.0, nothing, tally.stop, 0.0)


def sum_within(mesh: Mesh, tensor: Tensor) -> float:
    """Over the ranks of this one's replica, in place. Returns the seconds that this rank waited."""
    if mesh.layout.ranks_per_replica == 1:
        return 0.0
    start = time.perf_counter()
    mesh.wait(dist.all_reduce(tensor, group=mesh.within_replica, async_op=True))
    return time.perf_counter() - start


def totals_of(loss_sum: Tensor, weight: Tensor, stop: bool) -> Tensor:
    """(loss_sum, weight, stop), float64, for one sum over ranks."""
    return torch.stack([loss_sum, weight, torch.full_like(weight, stop)])
