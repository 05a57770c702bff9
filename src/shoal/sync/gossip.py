"""Replicas train apart and average with one other at a time: nothing in which all take part, however many they are.

Every replica has slow weights φ of its own. After H steps it meets another one. From how far both have moved, Δ, and
from both φ, its slow weights go on: v ← μ v + η mean(Δ) − γ (φ − mean(φ)), φ ← φ + v.

Source: Kolehmainen et al. 2025, "NoLoCo: No-all-reduce Low Communication Training Method for Large Models", section 3,
for groups of two; pairwise averaging: Boyd et al. 2006, "Randomized Gossip Algorithms".
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import operations
from shoal.checkpoint.manifest import Manifest
from shoal.job.sync import SyncOptions
from shoal.mesh import Mesh
from shoal.optim.update import Update
from shoal.parallel.replica import Replica, Tally
from shoal.shard import Shard, State
from shoal.sync import pairs, saved
from shoal.sync.codec.plain import Plain
from shoal.sync.encoded import EncodedSum
from shoal.sync.fragment import Fragment, named
from shoal.sync.step import Applied, Outer, Version, own_step, sum_within
from shoal.sync.waits import Heard


class Gossip:
    """One update a step within each replica; every so many steps, an exchange with one other replica."""

    def __init__(self, mesh: Mesh, clip: float, options: SyncOptions, seed: int):
        """clip: of each replica's own gradient. seed: of who meets whom."""
        self.mesh, self.clip, self.options, self.seed = mesh, clip, options, seed
        self._step = 0
        self._begun = False
        # Loss and weight of this replica's batches since its last meeting; the step after which the run shall stop.
        self._round = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        self._stop_after = math.inf
        self._heard = Heard(mesh)

    def attach(self, replica: Replica[Any], update: Update) -> None:
        self.replica, self.update = replica, update
        replica.on_bucket(lambda *_: None)
        learned = replica.shards()
        self.slow = Fragment(learned, replica.held()[len(learned) :], self.mesh.device)

    def begin(self, step: int) -> Version:
        """Nothing to wait for: a replica goes on from its own weights."""
        self._step = step
        self._part()
        operations.step(step + 1)
        return Version(self.update.done)

    def _part(self) -> None:
        """From the start on, or from where another sync has left them, replicas go ways of their own."""
        if not self._begun:
            self._begun = True
            self.slow.agree()

    def end(self, tally: Tally) -> Applied:
        """This replica's own update, and after every so many a meeting. Raises what collectives raise when a rank is
        lost."""
        own = own_step(self.mesh, self.replica, self.update, self.clip, tally, self.update.rate(self._step))
        if own.done.finite:
            self._round += own.counted
        start, step = time.perf_counter(), self._step + 1
        outer, finite = None, True
        last = step == self.update.steps
        if last:
            outer, finite = self._end()
        elif step % self.options.every == 0:
            outer, finite = self._meet(step // self.options.every - 1, own.stop)
        waited = own.waited + time.perf_counter() - start
        whence = "" if finite else f"what replica {self.mesh.replica} has learned"
        return Applied(
            own.done.finite and finite, Version(self.update.done), own.loss_sum, own.weight,
            own.weight * self.mesh.layout.replicas, own.done.norm, own.done.lr, stop=step >= self._stop_after,
            waited=waited, waits=self._heard.news(last), whence=whence, outer=outer,
        )  # fmt: skip

    def _meet(self, meeting: int, stop: bool) -> tuple[Outer, bool]:
        """With the partner of this meeting, if there is one: (outer step, whether this replica's part was finite)."""
        replicas, mine = self.mesh.layout.replicas, self.mesh.replica
        if stop and self._stop_after == math.inf:
            heard = pairs.heard_by_all(self.seed, meeting, replicas, mine)
            self._stop_after = (heard + 1) * self.options.every
        moved_N = self.slow.moved()
        squares = self.slow.squares(moved_N)
        broken = torch.tensor(float(not moved_N.isfinite().all()), device=self.mesh.device)
        totals = torch.stack([*self._round, squares, broken.double()])
        sum_within(self.mesh, totals)
        self._round.zero_()
        partner = pairs.partner(self.seed, meeting, replicas, mine)
        if partner is None:
            theirs, flat_N = None, None
        else:
            theirs, flat_N = self._swap(partner, totals, moved_N)
        ours_fine, theirs_fine = totals[3] == 0, theirs is not None and theirs[3] == 0
        drift = totals[2].clone()
        if theirs is not None and theirs_fine:
            totals[:2] += theirs[:2]
            drift = (drift + theirs[2]) / 2
        common = self._move(moved_N, flat_N, bool(ours_fine), bool(theirs_fine))
        self.slow.mix(0.0)
        sum_within(self.mesh, common)
        loss_sum, tokens, *_ = totals.tolist()
        loss = loss_sum / tokens if tokens else math.nan
        return Outer(loss, tokens, drift.item() ** 0.5, common.item() ** 0.5), bool(ours_fine)

    def _swap(self, partner: int, totals: Tensor, moved_N: Tensor) -> tuple[Tensor, Tensor]:
        """What that replica's rank in this one's place has: its figures; what it has moved, and its slow weights.

        Both send their figures first: until the other's are here, this replica waits for it.
        """
        stop = torch.tensor([self._stop_after], dtype=torch.float64, device=self.mesh.device)
        figures = torch.cat([totals, stop, self._heard.known_R.to(self.mesh.device)])
        mine = [figures, torch.stack([moved_N, self.slow.common_N])]
        theirs = [torch.empty_like(tensor) for tensor in mine]
        self._heard.add(self.mesh.swap(self.mesh.across_replicas, partner, mine, theirs))
        self._stop_after = min(self._stop_after, theirs[0][4].item())
        self._heard.hear(theirs[0][5:])
        return theirs[0][:4], theirs[1]

    def _move(self, moved_N: Tensor, theirs_2N: Tensor | None, fine: bool, theirs_fine: bool) -> Tensor:
        """The step of the slow weights. Returns the sum of squares of how far both have moved in the mean.

        A replica whose own are not finite takes over the other's; one whose partner's are not goes on alone.
        """
        slow_N, learned = self.slow.common_N, len(self.slow.velocity_n)
        if not fine:
            if theirs_2N is not None and theirs_fine:
                slow_N.copy_(theirs_2N[1])
                self.slow.velocity_n.zero_()
            return torch.full((), math.nan, dtype=torch.float64, device=slow_N.device)
        apart_N = torch.zeros_like(slow_N)
        if theirs_2N is not None and theirs_fine:
            moved_N = moved_N.add_(theirs_2N[0]).div_(2)
            apart_N = slow_N.sub(theirs_2N[1]).div_(2)
        squares = self.slow.squares(moved_N)
        # What moves by counts, not by gradients, is averaged.
        slow_N[learned:].sub_(moved_N[learned:]).sub_(apart_N[learned:])
        velocity_n = self.slow.velocity_n.mul_(self.options.momentum)
        velocity_n.add_(moved_N[:learned], alpha=-self.options.outer_lr)
        velocity_n.add_(apart_N[:learned], alpha=-self.options.pulled)
        slow_N[:learned].add_(velocity_n)
        return squares

    def _end(self) -> tuple[Outer, bool]:
        """The run ends: all replicas take the mean of their weights. Here all take part."""
        moved_N = self.slow.moved()
        squares = self.slow.squares(moved_N)
        mean_N = self.slow.common_N - moved_N
        self._mean(mean_N)
        finite = torch.tensor(float(mean_N.isfinite().all()), dtype=torch.float64, device=self.mesh.device)
        totals = torch.cat([self._round, squares[None], (1 - finite)[None], self._heard.own()])
        self.mesh.wait(dist.all_reduce(totals, group=self.mesh.everyone, async_op=True))
        self._heard.hear(totals[4:])
        loss_sum, tokens, drift, broken = totals[:4].tolist()
        if not broken:
            self.slow.common_N.copy_(mean_N)
        self.slow.mix(0.0)
        self._round.zero_()
        drift = (drift / self.mesh.layout.replicas) ** 0.5
        return Outer(loss_sum / tokens if tokens else math.nan, tokens, drift, math.nan), not broken

    def _mean(self, flat_N: Tensor) -> None:
        """Over replicas, in place; in the order of replicas, so that it is the same on all of them."""
        replicas = self.mesh.layout.replicas
        if replicas > 1 and flat_N.numel():
            summing = EncodedSum(Plain())
            summing.start(flat_N, self.mesh.across_replicas)
            summing.finish(self.mesh.across_replicas, self.mesh.wait)
        flat_N.div_(replicas)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Within, the replica has the mean of all slow weights. To be called on all ranks."""
        held = self.replica.held()
        before = [shard.local.clone() for shard in held]
        for shard, mean in zip(self.slow.shards, self._means(), strict=True):
            shard.local.copy_(mean.local)
        try:
            yield
        finally:
            for shard, values in zip(held, before, strict=True):
                shard.local.copy_(values)

    def _means(self) -> list[Shard]:
        """The mean of all replicas' slow weights, under their own names."""
        self._part()
        mean_N = self.slow.common_N.clone()
        self._mean(mean_N)
        return self.slow.like(mean_N)

    def alike(self) -> list[Shard]:
        """What must be equal to the last bit on all replicas: nothing."""
        return []

    def abandon(self) -> None:
        """After a failure: breaks off this step, so that whoever waits for this rank learns of it too."""
        self.mesh.abandon()

    def state(self) -> State:
        """The mean of all, and what each replica has of its own. To be called on all ranks."""
        self._part()
        layout = self.mesh.layout
        figures = torch.zeros(layout.replicas, 3, dtype=torch.float64, device=self.mesh.device)
        done = torch.tensor([float(self.update.done)], dtype=torch.float64, device=self.mesh.device)
        figures[self.mesh.replica, :1] = done / layout.ranks_per_replica
        figures[self.mesh.replica, 1:] = self._round
        self.mesh.wait(dist.all_reduce(figures, group=self.mesh.everyone, async_op=True))
        values = {
            "apart": layout.replicas,
            "kind": "gossip",
            "updates": [round(row[0]) for row in figures.tolist()],
            "round": [row[1:] for row in figures.tolist()],
        }
        return State([*self._means(), *self._own(self.mesh.replica)], values)

    def _own(self, replica: int) -> list[Shard]:
        """This replica's, under the name of that one."""
        slow = named("slow", self.slow.shards, self.slow.common_N)
        return [
            *saved.weights_of(replica, self.replica.held()),
            *saved.own(replica, self.update.state()),
            *saved.own(replica, [*slow, *self.slow.velocity()]),
        ]

    def wanted(self, what: Manifest) -> list[Shard]:
        """What to fill from a checkpoint, before `restore`.

        A replica that is new begins with the mean of all, and with the optimizer's state of one that was there. So do
        all where there are fewer, or what others had learned would be lost.
        """
        values = what.values
        replicas, mine = saved.replicas_apart(values), self.mesh.replica
        if not replicas or values["sync"]["kind"] != "gossip":
            return saved.equal(self.replica, self.update, values)
        if mine < replicas <= self.mesh.layout.replicas:
            return self._own(mine)
        moments = saved.own(mine % replicas, self.update.state())
        return [*self.replica.held(), *self.slow.common(), *moments]

    def restore(self, values: dict[str, Any]) -> None:
        """After the tensors that were `wanted` have been filled."""
        replicas, told, mine = saved.replicas_apart(values), values["sync"], self.mesh.replica
        if not replicas or told["kind"] != "gossip":
            self.update.restore(values["update"])
            return
        self._begun = True
        self.update.restore({**values["update"], "updates": told["updates"][mine % replicas]})
        if mine < replicas:
            # Of what its ranks have counted, the sum: one of them has it.
            first = self.mesh.rank % self.mesh.layout.ranks_per_replica == 0
            self._round.copy_(torch.tensor(told["round"][mine], dtype=torch.float64) * first)
