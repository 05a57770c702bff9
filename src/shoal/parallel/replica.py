"""One replica of the model, as this rank sees it: its shards, and how their gradients come about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shoal.mesh import Mesh
from shoal.parallel.buckets import Buckets
from shoal.parallel.fsdp import Sharded, local_gradient, rows_here
from shoal.parallel.pipeline import Pipeline
from shoal.parallel.tensor import Cut
from shoal.shard import Shard

B = TypeVar("B")

Loss = Callable[[nn.Module, B, Tensor | None], tuple[Tensor, Tensor]]
"""(module, batch, hidden states of the stage before or None) -> (loss summed over the batch's tokens, weight of those
tokens); of a stage that is not the last, hidden states instead of the loss."""


@dataclass
class Tally:
    """What this rank counted in one step. loss_sum, weight: sums over its tokens (float64 scalars on the device); zero
    where another rank counts them."""

    loss_sum: Tensor
    weight: Tensor
    stop: bool = False


@dataclass
class Part:
    """A stage's share of the model, on meta.

    blocks: the units in which parameters are gathered. cuts: parameter -> the piece that the tensor axis leaves of it,
    where there is one. shared: parameters that both the first stage and the last one have, as a tied embedding; both
    get the sum of their gradients, and the first one's counts.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    shared: Sequence[str] = ()


class Replica(Generic[B]):
    """A model on meta, cut for this rank's place in the mesh, then given memory.

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
        hidden: Callable[[B], Tensor] | None = None,
    ):
        """parts: stage -> its part of the model, for the stages of this rank. compute: dtype of matrix products, None =
        as stored. hidden: batch -> tensor on meta, as what one stage hands to the next (for a pipeline)."""
        self.parts, self.mesh, self._hidden = parts, mesh, hidden
        layout = mesh.layout
        self._on_bucket: Callable[[Tensor], None] | None = None
        between_replicas = self._bucket if layout.replicas > 1 else None
        self._sharded: list[Sharded] = []
        self._buckets: Buckets | None = None
        if layout.sharers > 1:
            self._sharded = [
                Sharded(
                    part.module,
                    part.blocks,
                    self._fsdp_mesh(),
                    layout.zero,
                    compute,
                    between_replicas,
                    layout.pipeline > 1,
                )
                for part in parts.values()
            ]
        for part in parts.values():
            part.module.to_empty(device=mesh.device)
        self._parameters = [p for part in parts.values() for p in part.module.parameters()]
        for sharded, part in zip(self._sharded, parts.values(), strict=False):
            sharded.hold(list(part.module.parameters()))
        if not self._sharded and between_replicas is not None:
            self._buckets = Buckets(self._parameters, bucket_bytes, between_replicas)
        self.pipeline: Pipeline[B] | None = None
        if layout.pipeline > 1:
            modules = {stage: part.module for stage, part in parts.items()}
            self.pipeline = Pipeline(modules, layout, mesh.group("pipeline"), mesh.device)
        self._described = [
            self._describe(stage, name, p)
            for stage, part in parts.items()
            for name, p in part.module.named_parameters()
        ]
        self._shards = [shard for shard, _ in self._described]
        self._share_saving()

    def _describe(self, stage: int, name: str, parameter: nn.Parameter) -> tuple[Shard, Cut]:
        part = self.parts[stage]
        cut = part.cuts.get(name) or Cut(tuple(parameter.shape), (0,) * parameter.ndim)
        local, first = parameter.detach(), 0
        if self._sharded:
            sharers = self.mesh.sharers
            local, first = rows_here(parameter, sharers.size(), sharers.rank())
        offsets = (cut.offsets[0] + first, *cut.offsets[1:]) if cut.offsets else ()
        counted = cut.counted and not (stage > 0 and name in part.shared)
        return Shard(name, cut.global_shape, offsets, local, counted=counted), cut

    def _fsdp_mesh(self) -> DeviceMesh:
        return DeviceMesh.from_group(self.mesh.sharers, self.mesh.device.type, mesh_dim_names=("fsdp",))

    @property
    def module(self) -> nn.Module:
        """The only module of this rank."""
        (part,) = self.parts.values()
        return part.module

    def _share_saving(self) -> None:
        """Equal pieces lie in every replica; they take turns in saving them."""
        for index, shard in enumerate(self._shards):
            shard.owner = shard.counted and index % self.mesh.layout.replicas == self.mesh.replica

    def move(self, mesh: Mesh) -> None:
        """The same pieces in another mesh, after a change in the number of replicas."""
        assert mesh.layout.ranks_per_replica == 1, "the other axes are bound to the groups they were built with"
        self.mesh = mesh
        self._share_saving()

    def shards(self) -> list[Shard]:
        """This rank's pieces, by canonical name, in the order of the forward pass."""
        return self._shards

    def on_bucket(self, fn: Callable[[Tensor], None]) -> None:
        """`fn(flat)` gets each flat piece of the gradient sum that all replicas must add up, once a step.

        In an order that is the same on every rank and in every step; it may start an operation that changes
        `flat` in place and must have ended when the shards' gradients are read.
        """
        self._on_bucket = fn

    def _bucket(self, flat: Tensor) -> None:
        assert self._on_bucket is not None, "attach a sync before asking for gradients"
        self._on_bucket(flat)

    def gradients(self, batches: Sequence[B], loss: Loss[B]) -> Tally:
        """Forward and backward over the micro-batches."""
        for parameter in self._parameters:
            parameter.grad = None
        tally = self._nothing()
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
        """Forward only."""
        tally = self._nothing()
        compute = self._counting(tally, loss)
        if self.pipeline is not None:
            self.pipeline.forward(batches, compute, self._like(batches[0]))
        else:
            for batch in batches:
                compute(self.module, batch, None)
        return tally

    def _nothing(self) -> Tally:
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return Tally(zero, zero.clone())

    def _like(self, batch: B) -> Tensor:
        assert self._hidden is not None, "a pipeline needs to know what stages hand on"
        return self._hidden(batch)

    def _counting(self, tally: Tally, loss: Loss[B]) -> Callable[[nn.Module, B, Tensor | None], Tensor]:
        """`loss` without its weight, which goes into the tally, as does the loss: once, though all ranks of the tensor
        axis have it."""
        last = self.parts.get(self.mesh.layout.stage_count - 1)

        def compute(module: nn.Module, batch: B, hidden: Tensor | None) -> Tensor:
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
        for shard, parameter in zip(self._shards, self._parameters, strict=True):
            shard.grad = local_gradient(parameter)
        if self.mesh.layout.tensor > 1:
            self._sum_over_tensor()
        if self.pipeline is not None:
            self._sum_shared(self.pipeline)
        return self._shards

    def _sum_over_tensor(self) -> None:
        """Gradients of what several ranks of the tensor axis hold, of which each has seen a part.

        One sum for all, so that they are equal to the last bit on all of these ranks.
        """
        summed = [(s, s.grad, cut) for s, cut in self._described if cut.summed and s.grad is not None]
        if not summed:
            return
        wide = [_in_whole(gradient, shard, cut) for shard, gradient, cut in summed]
        flat = torch.cat([w.flatten() for w in wide])
        self.mesh.wait(dist.all_reduce(flat, group=self.mesh.group("tensor"), async_op=True))
        for (shard, gradient, cut), w, piece in zip(summed, wide, flat.split([w.numel() for w in wide]), strict=True):
            gradient.copy_(_own(piece.view_as(w), shard, cut))

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
            self.mesh.wait(work)
        total = mine + other if pipeline.first else other + mine
        for gradient, piece in zip(ours, total.split([g.numel() for g in ours]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def _in_whole(gradient: Tensor, shard: Shard, cut: Cut) -> Tensor:
    """The gradient, in zeros of the whole's rows where ranks hold different pieces of it."""
    if cut.everywhere:
        return gradient
    whole = gradient.new_zeros(cut.global_shape)
    whole[_place(shard)] = gradient
    return whole


def _own(total: Tensor, shard: Shard, cut: Cut) -> Tensor:
    """The shard's piece of what `_in_whole` made, summed."""
    return total if cut.everywhere else total[_place(shard)]


def _place(shard: Shard) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.local.shape, strict=True))
