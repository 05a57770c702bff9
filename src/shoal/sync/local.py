"""Replicas train apart and come together every so many steps: local SGD, DiLoCo, streaming DiLoCo.

After H steps of its own, a replica's pseudo-gradient is the weights that all had in common minus its own. The mean of
these goes through an outer optimizer, which moves the common weights, and every replica goes on from them. Where
replicas learn from unequally many sequences, the mean counts them in that proportion, as in McMahan et al. 2017,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1; slower ones that take fewer
steps in a round: Liu et al. 2024, "Asynchronous Local-SGD Training for Language Modeling" (DyLU).

outer_lr=1, outer_momentum=0: weights are averaged (Stich 2019, "Local SGD Converges Fast and Communicates Little";
after some steps with all-reduce, Lin et al. 2020, "Don't Use Large Mini-batches, Use Local SGD"). Nesterov outside,
AdamW inside: Douillard et al. 2023, "DiLoCo". With fragments, delay and mix: Douillard et al. 2025, "Streaming DiLoCo".
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from shoal import operations
from shoal.checkpoint.manifest import Manifest
from shoal.job import shares
from shoal.job.sync import SyncOptions
from shoal.mesh import Mesh
from shoal.optim.update import Update
from shoal.parallel.replica import Replica, Tally
from shoal.shard import Shard, State
from shoal.sync import saved
from shoal.sync.allreduce import AllReduce
from shoal.sync.codec import Codec, Draws
from shoal.sync.exchange import Exchange, Lost
from shoal.sync.feedback import added_up
from shoal.sync.fragment import named
from shoal.sync.rounds import Rounds
from shoal.sync.step import Applied, Outer, Version, no_step, own_step


class Local:
    """One update a step within each replica; between replicas, nothing but the outer steps."""

    def __init__(self, mesh: Mesh, clip: float, codec: Codec | None, options: SyncOptions, draws: Draws | None = None):
        """clip: of each replica's own gradient. codec: how gradients are written on their way, or pseudo-gradients.
        draws: whence the codec has its random numbers."""
        self._draws = draws or Draws()
        self.mesh, self.clip, self.options, self._codec = mesh, clip, options, codec
        self.rounds = Rounds(options.every, options.fragments, options.delay)
        self._together = AllReduce(mesh, clip, codec, options.feedback, self._draws)
        self._apart = False
        self._step = 0
        # Tokens of a share of the batch, in this replica's last step.
        self._tokens = 0.0

    def attach(self, replica: Replica[Any], update: Update) -> None:
        self.replica, self.update = replica, update
        self._together.attach(replica, update)
        learned = replica.shards()
        self.exchange = Exchange(self.mesh, self.options, self._codec, learned, replica.held()[len(learned) :])

    def begin(self, step: int) -> Version:
        """Nothing to wait for: a replica goes on from its own weights."""
        self._step = step
        if not self._apart:
            if step < self.options.together:
                return self._together.begin(step)
            for fragment in self.exchange.fragments:
                fragment.agree()
            self._part()
        operations.step(step + 1)
        self._draws.at(step)
        return Version(self.update.done)

    def _part(self) -> None:
        """From here on gradients stay in the replica."""
        self._apart = True
        # With all that it kept for gradients.
        self._together = AllReduce(self.mesh, self.clip)
        self.replica.on_bucket(lambda *_: None)

    def end(self, tally: Tally) -> Applied:
        """This replica's own update, and after some steps the outer one. Raises what collectives raise when a rank is
        lost."""
        if not self._apart:
            return self._together.end(tally)
        lr, update = self.update.rate(self._step), self.update
        own = no_step(tally, lr) if tally.idle else own_step(self.mesh, self.replica, update, self.clip, tally, lr)
        if own.done.finite:
            self.exchange.round += own.counted
        start = time.perf_counter()
        outer, stop, finite = self._come_together(tally.stop)
        waited = own.waited + time.perf_counter() - start
        whence = "" if finite else "the mean over replicas of how far they had moved"
        return Applied(
            own.done.finite and finite, Version(self.update.done), own.loss_sum, own.weight,
            self._of_all(own.weight), own.done.norm, own.done.lr, stop=stop, waited=waited,
            waits=self.exchange.waits.news(), whence=whence, outer=outer,
        )  # fmt: skip

    def _of_all(self, tokens: float) -> float:
        """Of all replicas that take this step, if their sequences have as many tokens as this one's last ones."""
        layout = self.mesh.layout
        self._tokens = tokens / layout.shares[self.mesh.replica] if tokens else self._tokens
        taking = shares.taking(self.options, layout.replicas, self._step)
        return self._tokens * sum(layout.shares[r] for r in taking)

    def _come_together(self, stop: bool) -> tuple[Outer | None, bool, bool]:
        """What is due after this step, as `Exchange.arrive` tells it."""
        step, exchange = self._step + 1, self.exchange
        if step < self.update.steps or not self.rounds.delay:
            # After the last step, nothing that left now would arrive.
            for index in self.rounds.starts(step):
                exchange.leave(index)
        for index in self.rounds.turns(step):
            if index in exchange.travelling:
                exchange.turn(index)
        # After a resume with other rounds, or where replicas parted late, some may never have left.
        due = [index for index in self.rounds.ends(step) if index in exchange.travelling]
        outer, asked, finite = exchange.arrive(due, stop)
        if step < self.update.steps:
            return outer, asked, finite
        # The run ends: what was learned since a fragment left shall not be lost.
        rest = [i for i in range(self.rounds.fragments) if i not in due or self.options.mix]
        average, also_asked, also_finite = exchange.average(rest, stop)
        return outer or average, asked or also_asked, finite and also_finite

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Within, the replica has the weights that all have in common."""
        if not self._apart:
            yield
            return
        held = self.replica.held()
        before = [shard.local.clone() for shard in held]
        for fragment in self.exchange.fragments:
            fragment.mix(0.0)
        try:
            yield
        finally:
            for shard, values in zip(held, before, strict=True):
                shard.local.copy_(values)

    def alike(self) -> list[Shard]:
        """What must be equal to the last bit on all replicas."""
        return self._common() if self._apart else self.replica.held()

    def _common(self) -> list[Shard]:
        return [shard for fragment in self.exchange.fragments for shard in fragment.common()]

    def abandon(self) -> None:
        """After a failure: breaks off this step, so that whoever waits for this rank learns of it too."""
        self.exchange.forget()
        self._together.abandon()

    def state(self) -> State:
        """What all have in common, and what each replica has of its own. To be called on all ranks."""
        if not self._apart:
            return self._together.state()
        layout, exchange = self.mesh.layout, self.exchange
        travelling = sorted(exchange.travelling)
        for index in travelling:
            exchange.finish(index)
        updates_R = torch.zeros(layout.replicas, dtype=torch.float64, device=self.mesh.device)
        updates_R[self.mesh.replica] = self.update.done / layout.ranks_per_replica
        totals = torch.cat([updates_R, exchange.figures()])
        self.mesh.wait(dist.all_reduce(totals, group=self.mesh.everyone, async_op=True))
        updates, figures = totals.tolist()[: layout.replicas], totals.tolist()[layout.replicas :]
        values = {
            "kind": "local",
            "apart": layout.replicas,
            "updates": [round(done) for done in updates],
            "rounds": [self.rounds.every, self.rounds.fragments, self.rounds.delay],
            "travelling": travelling,
            "figures": figures if all(map(math.isfinite, figures)) else [],
        }
        unsent = [shard for lost in exchange.unsent() for shard in _unsent(lost, self.mesh.replica)]
        return State([*self._shared(values), *self._own(self.mesh.replica), *unsent], values)

    def _shared(self, values: dict[str, Any]) -> list[Shard]:
        """Of the state that these values belong to, what is equal on all replicas."""
        fragments, sent = self.exchange.fragments, self.exchange.travelling
        arriving = [named("arriving", fragments[i].shards, sent[i].moved_N) for i in values["travelling"]]
        return [*self._common(), *(s for f in fragments for s in f.velocity()), *(s for a in arriving for s in a)]

    def _own(self, replica: int) -> list[Shard]:
        """This replica's, under the name of that one."""
        return [*saved.weights_of(replica, self.replica.held()), *saved.own(replica, self.update.state())]

    def _were_apart(self, values: dict[str, Any]) -> bool:
        """Whether these replicas go on from what each of others like them had of its own."""
        apart = saved.replicas_apart(values) > 0 and values["sync"]["kind"] == "local"
        return apart and values["step"] >= self.options.together

    def wanted(self, what: Manifest) -> Iterator[Shard]:
        """What to fill from a checkpoint, before `restore`: each shard before the next is asked for.

        A replica that is new begins with the common weights, and with the optimizer's state of one that was there.
        """
        if not self._were_apart(what.values):
            yield from self._together.wanted(what)
            return
        told, exchange, mine = what.values["sync"], self.exchange, self.mesh.replica
        if told["rounds"] != [self.rounds.every, self.rounds.fragments, self.rounds.delay]:
            # What was on its way had left for other rounds than these: it stays in each replica's own weights.
            told["travelling"] = []
        exchange.forget()
        for index in told["travelling"]:
            exchange.expect(index)
        yield from self._shared(told)
        if mine < told["apart"]:
            yield from self._own(mine)
        else:
            yield from self.replica.held()
            yield from saved.own(mine % told["apart"], self.update.state())
        yield from self._losses(what)

    def _losses(self, what: Manifest) -> Iterator[Shard]:
        """What a codec had lost. With however many replicas, it still does the same to the common weights: that of
        replica r goes to r modulo their number."""
        losses, layout = self.exchange.unsent(), self.mesh.layout
        old = range(self.mesh.replica, int(what.values["sync"]["apart"]), layout.replicas)
        if not losses or not any(name.startswith("unsent.") for name in what.tensors):
            return
        for lost in losses:
            for own, sums in zip(*_unsent_pairs(lost), strict=True):
                yield sums
                yield from added_up(own, [f"unsent@{r}.{sums.name.removeprefix('unsent.')}" for r in old])
        self.exchange.lose(losses, int(what.values["sync"]["apart"]))

    def restore(self, values: dict[str, Any]) -> None:
        """After the tensors that were `wanted` have been filled."""
        replicas, told = saved.replicas_apart(values), values["sync"]
        if not self._were_apart(values):
            self._together.restore(values)
            return
        self.update.restore({**values["update"], "updates": told["updates"][self.mesh.replica % replicas]})
        if self.mesh.rank == 0 and told["figures"]:
            self.exchange.count(told["figures"])
        self._part()


def _unsent(lost: Lost, replica: int) -> list[Shard]:
    """`unsent@<replica>.<name>` of this replica, and `unsent.<name>` of sums."""
    own, sums = _unsent_pairs(lost)
    return [*saved.own(replica, own), *sums]


def _unsent_pairs(lost: Lost) -> tuple[list[Shard], list[Shard]]:
    return named("unsent", lost.shards, lost.own_N), named("unsent", lost.shards, lost.sums_N)
