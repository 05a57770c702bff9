"""Replicas add up their gradients every step (Li et al. 2020, "PyTorch Distributed", for buckets and overlap)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import operations
from shoal.checkpoint.manifest import Manifest
from shoal.errors import LayoutError
from shoal.job.shares import written
from shoal.mesh import Mesh, View, build
from shoal.optim.update import Update, counts
from shoal.parallel.flat import Flat
from shoal.parallel.replica import Replica, Tally
from shoal.shard import Shard, State
from shoal.sync import saved
from shoal.sync.codec import Codec, Draws
from shoal.sync.encoded import EncodedSum
from shoal.sync.feedback import Owed
from shoal.sync.lowrank import LowRank, LowRankSum
from shoal.sync.step import Applied, Version, apply, totals_of
from shoal.sync.waits import Waits


class AllReduce:
    """One update a step, from the sum of all replicas' gradients, clipped and applied on every rank."""

    def __init__(
        self,
        mesh: Mesh,
        clip: float,
        codec: Codec | LowRank | None = None,
        feedback: bool = True,
        draws: Draws | None = None,
    ):
        """clip: largest gradient norm, 0 = none. codec: how gradients are written on their way, None = as they are.
        feedback: whether what it loses is added to the next ones. draws: whence the codec has its random numbers."""
        self.mesh, self.clip = mesh, clip
        self._codec, self._feedback = codec, feedback
        self._draws = draws or Draws()
        self._works: list[dist.Work] = []
        self._waits = Waits(mesh)
        self._step = 0
        self._encoded: EncodedSum | LowRankSum | None = None
        self._owed = Owed()

    def attach(self, replica: Replica, update: Update) -> None:
        self.replica, self.update = replica, update
        alone = self.mesh.layout.replicas == 1
        if isinstance(self._codec, LowRank) and not alone:
            self._encoded = LowRankSum(self._codec, self._feedback, replica)
        elif self._codec is not None and not isinstance(self._codec, LowRank) and not alone:
            self._encoded = EncodedSum(self._codec, self._feedback)
        replica.on_bucket(self._send)

    def _send(self, flat: Tensor, place: Flat) -> None:
        if self._encoded is not None:
            self._encoded.start(flat, self.mesh.across_replicas, place)
            return
        work = dist.all_reduce(flat, group=self.mesh.across_replicas, async_op=True)
        assert work is not None
        self._works.append(work)

    def begin(self, step: int) -> Version:
        """Nothing to wait for: every rank already holds the newest weights."""
        operations.step(step + 1)
        self._step = step
        self._draws.at(step)
        self._forget()
        return Version(step)

    def end(self, tally: Tally) -> Applied:
        """Waits for the sums, then normalises, clips and updates. Raises what collectives raise when a rank is lost."""
        start = time.perf_counter()
        # Who waited in this step is known after its last collective, and told with the next one's.
        totals = torch.cat([totals_of(tally.loss_sum, tally.weight, tally.stop), self._waits.own()])
        counted = dist.all_reduce(totals, group=self.mesh.everyone, async_op=True)
        for work in self._works:
            self._waits.wait(work)
        if self._encoded is not None:
            self._encoded.finish(self.mesh.across_replicas, self._waits.wait)
        self._forget()
        assert counted is not None
        self._waits.wait(counted)
        loss_sum, weight, stop, *waits = totals.tolist()
        self._waits.hear(waits)
        shards = self.replica.collect()
        self._owed.add_to(shards)
        waited = time.perf_counter() - start
        counting = self.mesh.everyone if self.mesh.world > 1 else None
        rate = self.update.rate(self._step)
        done = apply(self.replica, self.update, shards, self.clip, loss_sum, weight, counting, rate)
        self._settle(applied=done.finite)
        return Applied(
            done.finite, Version(self.update.done), loss_sum, weight, weight, done.norm, done.lr, stop=stop > 0,
            waited=waited + done.waited, waits=self._waits.news(), whence="" if done.finite else self._whence(tally),
        )  # fmt: skip

    def _settle(self, applied: bool) -> None:
        """What a codec has lost of a step's gradients counts only where the step does."""
        self._owed.settle(applied)
        if self._encoded is not None:
            self._encoded.settle(applied)

    def _whence(self, tally: Tally) -> str:
        """Whose weights or whose loss is not finite, by what each rank sees in its own; all call it together."""
        weights = all(bool(shard.local.isfinite().all()) for shard in self.replica.held())
        own = torch.stack([torch.tensor(not weights, device=self.mesh.device), ~tally.loss_sum.isfinite().all()])
        of_ranks = torch.zeros(self.mesh.world, 2, dtype=torch.int64, device=self.mesh.device)
        of_ranks[self.mesh.rank] = own
        self.mesh.wait(dist.all_reduce(of_ranks, group=self.mesh.everyone, async_op=True))
        for what, found in zip(("weights", "loss"), of_ranks.T, strict=True):
            ranks = [str(self.mesh.view.members[i]) for i in found.nonzero().flatten().tolist()]
            if ranks:
                return f"{what} of rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}"
        return ""

    def abandon(self) -> None:
        """After a failure: breaks off this step, so that whoever waits for this rank learns of it too."""
        self._forget()
        self.mesh.abandon()

    def _forget(self) -> None:
        self._works.clear()
        if self._encoded is not None:
            self._encoded.forget()

    def reconfigure(self, view: View) -> Mesh:
        """Goes on among the members of `view`, at a step boundary: the broken step is computed again by them.

        One survivor may have finished the step in which another was cut off; everybody then takes the state of
        whoever is furthest. What a codec has lost of the lost rank's gradients is lost. Raises LayoutError where a lost
        rank held a piece that no other has.
        """
        layout, before = self.mesh.layout, self.mesh.view.members
        if layout.ranks_per_replica > 1:
            raise LayoutError(
                f"layout {layout}: a replica that lost one of its ranks cannot go on in process",
                fix="resume from the last checkpoint, on any number of ranks",
            )
        self._forget()
        self.mesh.close()
        known = dict(zip(before, layout.shares, strict=True))
        kept = written([known.get(member, 1) for member in view.members])
        layout = replace(layout, replicas=len(view.members), replica_share=kept)
        self.mesh = build(layout, self.mesh.seat, view, self.mesh.timeout)
        self._waits = Waits(self.mesh)
        self.replica.move(self.mesh)
        # Of each rank: updates that its weights have had, and those of them that its optimizer has not seen.
        told_R2 = torch.zeros(self.mesh.world, 2, dtype=torch.int64, device=self.mesh.device)
        told_R2[self.mesh.rank] = torch.tensor([self.update.done, self.update.since])
        self.mesh.wait(dist.all_reduce(told_R2, group=self.mesh.everyone, async_op=True))
        source = int(told_R2[:, 0].argmax())
        done, since = told_R2[source].tolist()
        # What whoever is behind has sent in the broken step is in the weights that it gets now.
        self._settle(applied=self.update.done < done)
        if self._encoded is not None and self._encoded.feedback is not None:
            self._encoded.feedback.keep_sums()
        if bool((told_R2 != told_R2[source]).any()):
            for shard in (*self.replica.held(), *self.update.state(), *self._common()):
                self.mesh.wait(dist.broadcast(shard.local, source, group=self.mesh.everyone, async_op=True))
            self.update.restore(counts(done, since))
        return self.mesh

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Within, the replica has the weights that all have in common: as always."""
        yield

    def alike(self) -> list[Shard]:
        """What must be equal to the last bit on all replicas."""
        return [*self.replica.held(), *self._common()]

    def _common(self) -> list[Shard]:
        """What a codec knows that is the same on all replicas."""
        return [] if self._encoded is None else self._encoded.common(self.replica)

    def state(self) -> State:
        """Weights and optimizer; replicas are equal after every step. And what a codec has lost, or needs to go on."""
        own = [] if self._encoded is None else self._encoded.state(self.replica)
        return State([*self.replica.held(), *self.update.state(), *self._owed.state(), *own])

    def wanted(self, what: Manifest) -> Iterator[Shard]:
        """What to fill from a checkpoint, before `restore`: each shard before the next is asked for."""
        yield from saved.equal(self.replica, self.update, what.values)
        if self._encoded is None or self._encoded.feedback is None:
            yield from self._owed.wanted(self.replica, what.tensors)
        if self._encoded is not None:
            yield from self._encoded.wanted(self.replica, what.tensors)

    def restore(self, values: dict[str, Any]) -> None:
        """After the tensors that were `wanted` have been filled."""
        self.update.restore(values["update"])
