"""One replica of the model, as this rank sees it: its shards, and how their gradients come about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shoal.mesh import Mesh
from shoal.models.storage import buffers
from shoal.parallel.buckets import Buckets
from shoal.parallel.expert import Balance, Use
from shoal.parallel.flat import Flat
from shoal.parallel.fsdp import Sharded, is_sharded
from shoal.parallel.pieces import Part, Piece, pieces_of, sum_over
from shoal.parallel.pipeline import Compute, Like, Pipeline
from shoal.shard import Shard

B = TypeVar("B")

Loss = Callable[[nn.Module, B, Any], tuple[Any, Tensor]]
"""(module, batch, hidden states of the stage before or None) -> (loss summed over the batch's tokens, weight of those
tokens); of a stage that is not the last, hidden states instead of the loss."""


@dataclass
class Tally:
    """What this rank counted in one step. loss_sum, weight: sums over its tokens (float64 scalars on the device); zero
    where another rank counts them. idle: its replica does not take this step."""

    loss_sum: Tensor
    weight: Tensor
    stop: bool = False
    idle: bool = False


class Replica(Generic[B]):
    """A model on meta, cut for this rank's place in the mesh, then given memory; or one on its device, with its values.

    Between `gradients` and the update, every shard's `.grad` is the SUM over the tokens of this rank's batch
    (with fsdp: over the batches of all its replica's ranks), not yet normalised.
    """

    def __init__(
        self,
        parts: dict[int, Part],
        mesh: Mesh,
        *,
        compute: torch.dtype | None = None,
        bucket_bytes: int = 25 << 20,
        hidden: Callable[[B], Like] | None = None,
    ):
        """parts: stage -> its part of the model, for the stages of this rank. compute: dtype of matrix products, None =
        as stored. hidden: batch -> on meta, what one stage hands to the next (for a pipeline)."""
        self.parts, self.mesh, self._hidden = parts, mesh, hidden
        layout = mesh.layout
        self._on_bucket: Callable[[Tensor, Flat], None] | None = None
        between_replicas = self._bucket if layout.replicas > 1 else None
        self._buckets: Buckets | None = None
        # Of experts, the ranks with the same ones; None where a rank has the only copy, or nothing is sharded.
        self._rest = mesh.group("rest") if layout.sharers > 1 and layout.expert > 1 and layout.rest > 1 else None
        self._sharded = self._shard(compute, between_replicas) if layout.sharers > 1 else []
        for part in parts.values():
            if any(p.is_meta for p in part.module.parameters()):
                part.module.to_empty(device=mesh.device)
        self._parameters = [p for part in parts.values() for p in part.module.parameters()]
        for sharded, part in zip(self._sharded, parts.values(), strict=False):
            sharded.hold([p for p in part.module.parameters() if is_sharded(p)])
        whole = [p for p in self._parameters if not is_sharded(p)]
        if whole and between_replicas is not None:
            self._buckets = Buckets(whole, bucket_bytes, between_replicas)
        self.pipeline: Pipeline[B] | None = None
        if layout.pipeline > 1:
            modules = {stage: part.module for stage, part in parts.items()}
            self.pipeline = Pipeline(modules, layout, mesh.group("pipeline"), mesh.device)
        self._pieces = [piece for stage, part in parts.items() for piece in pieces_of(part, stage, self._sharers)]
        self._shards = [piece.shard for piece in self._pieces]
        self._states = [
            Shard(name, tuple(buffer.shape), (0,) * buffer.ndim, buffer.detach(), counted=False)
            for part in parts.values()
            for name, buffer in buffers(part.module)
        ]
        self._balance = Balance([part.module for part in parts.values()])
        self.used: Use | None = None
        """How experts were used by the last step, once it has been applied; None where there are none."""
        self._share_saving()

    def _shard(self, compute: torch.dtype | None, on_bucket: Callable[[Tensor, Flat], None] | None) -> list[Sharded]:
        layout, rest = self.mesh.layout, None if self._rest is None else self._fsdp_mesh(self._rest)
        everyone, is_stage = self._fsdp_mesh(self.mesh.sharers), layout.pipeline > 1
        return [
            Sharded(
                p.module, p.blocks, everyone, layout.zero, compute, on_bucket, is_stage, p.experts, rest, p.in_order
            )
            for p in self.parts.values()
        ]

    def _sharers(self, parameter: nn.Parameter) -> dist.ProcessGroup:
        """The ranks over which it is spread: of experts those that have the same ones."""
        experts = (module for part in self.parts.values() for module in part.experts)
        if self._rest is not None and any(parameter is other for module in experts for other in module.parameters()):
            return self._rest
        return self.mesh.sharers

    def _fsdp_mesh(self, group: dist.ProcessGroup) -> DeviceMesh:
        return DeviceMesh.from_group(group, self.mesh.device.type, mesh_dim_names=("fsdp",))

    @property
    def module(self) -> nn.Module:
        """The only module of this rank."""
        (part,) = self.parts.values()
        return part.module

    def _share_saving(self) -> None:
        """Equal pieces lie in every replica; they take turns in saving them."""
        for index, shard in enumerate(self._shards):
            shard.owner = shard.counted and index % self.mesh.layout.replicas == self.mesh.replica
        first = (self.mesh.fsdp, self.mesh.context, self.mesh.tensor) == (0, 0, 0)
        for state in self._states:
            state.counted, state.owner = first, first and self.mesh.replica == 0

    def move(self, mesh: Mesh) -> None:
        """The same pieces in another mesh, after a change in the number of replicas."""
        assert mesh.layout.ranks_per_replica == 1, "the other axes are bound to the groups they were built with"
        self.mesh = mesh
        self._share_saving()

    def shards(self) -> list[Shard]:
        """This rank's pieces of what is learned, by canonical name, in the order of the forward pass."""
        return self._shards

    def held(self) -> list[Shard]:
        """The same, and what else the model needs to go on but no gradient reaches, which every rank has whole."""
        return [*self._shards, *self._states]

    def alike(self) -> list[Shard]:
        """Those of `held` that are the same on all ranks of the tensor axis."""
        alike = (piece for piece in self._pieces if piece.cut.summed == "tensor" and piece.cut.everywhere)
        return [*(piece.shard for piece in alike), *self._states]

    def on_bucket(self, fn: Callable[[Tensor, Flat], None]) -> None:
        """`fn(flat, place)` gets each flat piece of the gradient sum that all replicas must add up, once a step, and
        where what lies in it: one of `flats`.

        In an order that is the same on every rank and in every step; it may start an operation that changes
        `flat` in place and must have ended when the shards' gradients are read.
        """
        self._on_bucket = fn

    def _bucket(self, flat: Tensor, place: Flat) -> None:
        assert self._on_bucket is not None, "attach a sync before asking for gradients"
        self._on_bucket(flat, place)

    def flats(self) -> list[Flat]:
        """All that `on_bucket` hands over in a step, in some order."""
        whole = [bucket.place for bucket in self._buckets.buckets] if self._buckets else []
        return [*(place for sharded in self._sharded for place in sharded.flats if place.size), *whole]

    def summed(self) -> int:
        """Numbers of the gradient that this rank adds up with other replicas in a step."""
        return sum(
            shard.local.numel()
            for place in self.flats()
            for _, shard in self.lying_in(place, torch.empty(place.size, device="meta"))
        )

    def lying_in(self, place: Flat, stretch_N: Tensor, first: int = 0) -> Iterator[tuple[Piece, Shard]]:
        """What lies in the stretch from `first` on of a flat tensor, by canonical name: each piece of this rank and a
        view of the numbers that belong to (a part of) it."""
        for piece in self._pieces:
            for shard in piece.lying_in(place, stretch_N, first):
                yield piece, shard

    def gradients(self, batches: Sequence[B], loss: Loss[B]) -> Tally:
        """Forward and backward over the micro-batches; without any, nothing is computed or sent."""
        for parameter in self._parameters:
            parameter.grad = None
        self._balance.forget()
        self.used = None
        tally = self._nothing()
        if not batches:
            tally.idle = True
            return tally
        if self.pipeline is not None:
            for sharded in self._sharded:
                sharded.whole_step()
            with self._buckets.backwards(len(batches)) if self._buckets else nullcontext():
                self.pipeline.run(batches, self._counting(tally, loss), self._like(batches[0]))
            return tally
        compute = self._counting(tally, loss)
        with self._buckets.backwards(len(batches)) if self._buckets else nullcontext():
            for index, batch in enumerate(batches):
                with self._backward(last=index == len(batches) - 1):
                    compute(self.module, batch, None).backward()
        return tally

    @torch.no_grad()
    def evaluate(self, batches: Sequence[B], loss: Loss[B]) -> Tally:
        """Forward only, of modules in evaluation mode."""
        tally = self._nothing()
        compute = self._counting(tally, loss)
        with self._evaluating():
            if self.pipeline is not None:
                self.pipeline.forward(batches, compute, self._like(batches[0]))
            else:
                for batch in batches:
                    compute(self.module, batch, None)
        return tally

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for part in self.parts.values() for module in part.module.modules()]
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training

    def _nothing(self) -> Tally:
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return Tally(zero, zero.clone())

    def _like(self, batch: B) -> Like:
        assert self._hidden is not None, "a pipeline needs to know what stages hand on"
        return self._hidden(batch)

    def _counting(self, tally: Tally, loss: Loss[B]) -> Compute[B]:
        """`loss` without its weight, which goes into the tally, as does the loss: once, though all ranks of the tensor
        axis have it."""
        last = self.parts.get(self.mesh.layout.stage_count - 1)

        def compute(module: nn.Module, batch: B, hidden: Any) -> Any:
            value, weight = loss(module, batch, hidden)
            if last is not None and module is last.module and self.mesh.tensor == 0:
                tally.loss_sum += value.detach()
                tally.weight += weight
            return value

        return compute

    @contextmanager
    def _backward(self, last: bool) -> Iterator[None]:
        if self._sharded:
            (sharded,) = self._sharded
            with sharded.backward(last):
                yield
        else:
            yield

    def collect(self) -> list[Shard]:
        """The shards with their gradients, once every bucket has been reduced. To be called on all ranks."""
        for piece in self._pieces:
            piece.take_gradient()
        for axis in ("tensor", "rest"):
            sum_over(axis, self._pieces, self.mesh)
        if self.pipeline is not None:
            self._sum_shared(self.pipeline)
        return self._shards

    def updated(self, counting: dist.ProcessGroup | None) -> None:
        """To be called once the update has been applied: what goes by how experts were used moves on.

        counting: the ranks whose batches the step was of, all of which call it; None = this one alone.
        """
        self.used = self._balance.move(self.mesh, counting)

    def _sum_shared(self, pipeline: Pipeline[B]) -> None:
        """What the first stage and the last one both have: the sum of both gradients, added in the same order."""
        names = {name for part in self.parts.values() for name in part.shared}
        ours = [s.grad for s in self._shards if s.name in names and s.grad is not None]
        if not ours:
            return
        if pipeline.first and pipeline.last:
            half = len(ours) // 2
            for first, last in zip(ours[:half], ours[half:], strict=True):
                last.copy_(first.add_(last))
            return
        mine = torch.cat([g.flatten() for g in ours])
        other = torch.empty_like(mine)
        for work in pipeline.swap_ends(mine, other):
            assert work is not None
            work.wait()  # not `mesh.wait`: gloo closes the connection of a send or receive whose wait is cut short
        total = mine + other if pipeline.first else other + mine
        for gradient, piece in zip(ours, total.split([g.numel() for g in ours]), strict=True):
            gradient.copy_(piece.view_as(gradient))
