"""A worker that takes steps of its own between a pull and a push: asynchronous DiLoCo, through a parameter server.

What it pushes is how far they took it from the weights that it pulled; the servers follow by Nesterov momentum (Liu et
al. 2024, "Asynchronous Local-SGD Training for Language Modeling", algorithm 1; its delayed Nesterov is
`server.compensation=delayed-nesterov`). With bsp it is DiLoCo (Douillard et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from shoal.data.batch import Batch
from shoal.job import Job
from shoal.mesh import Mesh
from shoal.optim.norm import sum_of_squares
from shoal.optim.schedule import learning_rate
from shoal.optim.update import Update
from shoal.parallel.expert import Use, added
from shoal.parallel.replica import Replica
from shoal.sync.server.messages import Range
from shoal.sync.step import own_step, sum_within
from shoal.training.objective import Objective


class Apart:
    """The inner optimizer of one worker. It lasts as long as the process: a worker that is started again begins anew,
    and a checkpoint does not have it."""

    def __init__(self, job: Job, mesh: Mesh, replica: Replica[Batch], objective: Objective):
        self.job, self.mesh, self.replica, self.objective = job, mesh, replica, objective
        self.update = Update(replica.shards(), job.optim, job.train.steps)
        # How far the last steps took the replica, and how they used experts.
        self.drift = 0.0
        self.used: Use | None = None

    def learn(self, steps: Iterable[tuple[Range, list[Batch]]]) -> tuple[float, float]:
        """One step on each of these batches, from the weights that are there.

        Leaves in the shards' gradients how far that was, times the tokens: servers divide by all tokens in an update.
        Returns loss and weight, summed up. The rate of a step is that of its place in the data.
        """
        shards, batch = self.replica.shards(), self.job.train.global_batch
        before = [shard.local.clone() for shard in shards]
        loss_sum = weight = 0.0
        finite, self.used = True, None
        for samples, batches in steps:
            self.objective.step = samples.start // batch
            rate = learning_rate(self.job.optim, samples.start / batch, self.job.train.steps)
            tally = self.replica.gradients(batches, self.objective)
            own = own_step(self.mesh, self.replica, self.update, self.job.optim.clip, tally, rate)
            loss_sum, weight, finite = loss_sum + own.loss_sum, weight + own.weight, finite and own.done.finite
            self.used = added(self.used, self.replica.used)
        with torch.no_grad():
            for shard, old in zip(shards, before, strict=True):
                # What is not finite, the coordinator refuses, as it does such a gradient.
                shard.grad = old.sub_(shard.local).mul_(weight if finite else math.nan)
        squares = sum_of_squares(shards)
        sum_within(self.mesh, squares)
        self.drift = squares.sqrt().item() / weight if weight else 0.0
        return loss_sum, weight
