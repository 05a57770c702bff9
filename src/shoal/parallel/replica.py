"""One replica of the model, as this rank sees it: its shards, and how their gradients come about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shoal.mesh import Mesh
from shoal.models.storage import Stored, buffers, stored_in
from shoal.parallel.buckets import Buckets
from shoal.parallel.expert import Balance, Use
from shoal.parallel.fsdp import Sharded, is_sharded, local_gradient, rows_here
from shoal.parallel.pipeline import Compute, Like, Pipeline
from shoal.parallel.tensor import Cut
from shoal.shard import Shard

B = TypeVar("B")

Index = int | slice | EllipsisType
"""Where a shard lies in what this rank has of a parameter."""

Loss = Callable[[nn.Module, B, Any], tuple[Any, Tensor]]
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

    blocks: the units in which parameters are gathered. cuts: parameter -> the piece that the tensor axis or the expert
    axis leaves of it, where there is one. shared: parameters that both the first stage and the last one have, as a tied
    embedding; both get the sum of their gradients, and the first one's counts. experts: modules in the blocks that the
    expert axis has cut; `zero` spreads their parameters over the ranks with the same piece, not over all sharers.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    shared: Sequence[str] = ()
    experts: Sequence[nn.Module] = ()


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
        self._on_bucket: Callable[[Tensor], None] | None = None
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
        self._origins: list[tuple[nn.Parameter, Index]] = []
        self._described: list[tuple[Shard, Cut]] = []
        for stage, part in parts.items():
            for name, parameter in part.module.named_parameters():
                self._describe(stage, name, parameter)
        self._shards = [shard for shard, _ in self._described]
        self._states = [
            Shard(name, tuple(buffer.shape), (0,) * buffer.ndim, buffer.detach(), counted=False)
            for part in parts.values()
            for name, buffer in buffers(part.module)
        ]
        self._balance = Balance([part.module for part in parts.values()])
        self.used: Use | None = None
        """How experts were used by the last step, once it has been applied; None where there are none."""
        self._share_saving()

    def _shard(self, compute: torch.dtype | None, on_bucket: Callable[[Tensor], None] | None) -> list[Sharded]:
        layout, rest = self.mesh.layout, None if self._rest is None else self._fsdp_mesh(self._rest)
        everyone, is_stage = self._fsdp_mesh(self.mesh.sharers), layout.pipeline > 1
        return [
            Sharded(p.module, p.blocks, everyone, layout.zero, compute, on_bucket, is_stage, p.experts, rest)
            for p in self.parts.values()
        ]

    def _describe(self, stage: int, name: str, parameter: nn.Parameter) -> None:
        """Appends the parameter's shards, what the other axes left of each, and where they lie in it."""
        part = self.parts[stage]
        local, first = parameter.detach(), 0
        if is_sharded(parameter):
            sharers = self._rest if self._rest is not None and self._is_cut(part, parameter) else self.mesh.sharers
            local, first = rows_here(parameter, sharers.size(), sharers.rank())
        stored = stored_in(part.module, name)
        if stored is not None and stored[0][1] is not None:
            for canonical, rows, start, here in _stretches(stored, first, len(local)):
                cut = part.cuts.get(canonical) or Cut((rows, *parameter.shape[1:]), (0,) * parameter.ndim)
                self._append(canonical, cut, (cut.offsets[0] + start, *cut.offsets[1:]), local[here], parameter, here)
            return
        cut = part.cuts.get(name) or Cut(tuple(parameter.shape), (0,) * parameter.ndim)
        cut = replace(cut, counted=cut.counted and not (stage > 0 and name in part.shared))
        offsets = (cut.offsets[0] + first, *cut.offsets[1:]) if cut.offsets else ()
        if stored is None:
            self._append(name, cut, offsets, local, parameter, ...)
            return
        one = replace(cut, global_shape=cut.global_shape[1:], offsets=cut.offsets[1:])
        for row, piece in enumerate(local):
            self._append(stored[offsets[0] + row][0], one, offsets[1:], piece, parameter, row)

    def _append(
        self, name: str, cut: Cut, offsets: tuple[int, ...], local: Tensor, parameter: nn.Parameter, index: Index
    ) -> None:
        self._described.append((Shard(name, cut.global_shape, offsets, local, counted=cut.counted), cut))
        self._origins.append((parameter, index))

    def _is_cut(self, part: Part, parameter: nn.Parameter) -> bool:
        return any(parameter is other for module in part.experts for other in module.parameters())

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
        first = (self.mesh.replica, self.mesh.fsdp, self.mesh.context, self.mesh.tensor) == (0, 0, 0, 0)
        for state in self._states:
            state.owner = first

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

    def alike(self, axis: str) -> list[Shard]:
        """Those of `held` that are the same on all ranks of the axis, `replicas` or `tensor`."""
        if axis == "replicas":
            return self.held()
        return [*(shard for shard, cut in self._described if cut.summed == "tensor" and cut.everywhere), *self._states]

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
        self._balance.forget()
        self.used = None
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
        for shard, (parameter, index) in zip(self._shards, self._origins, strict=True):
            gradient = local_gradient(parameter)
            shard.grad = None if gradient is None else gradient[index]
        for axis in ("tensor", "rest"):
            self._sum_over(axis)
        if self.pipeline is not None:
            self._sum_shared(self.pipeline)
        return self._shards

    def updated(self) -> None:
        """To be called on all ranks once the update has been applied: what goes by how experts were used moves on."""
        self.used = self._balance.move(self.mesh)

    def _sum_over(self, axis: str) -> None:
        """Gradients of what several ranks of the axis hold, of which each has seen a part.

        One sum for all, so that they are equal to the last bit on all of these ranks.
        """
        summed = [(s, s.grad, cut) for s, cut in self._described if cut.summed == axis and s.grad is not None]
        if not summed:
            return
        wide = [_in_whole(gradient, shard, cut) for shard, gradient, cut in summed]
        flat = torch.cat([w.flatten() for w in wide])
        self.mesh.wait(dist.all_reduce(flat, group=self.mesh.group(axis), async_op=True))
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
            assert work is not None
            work.wait()  # not `mesh.wait`: gloo closes the connection of a send or receive whose wait is cut short
        total = mine + other if pipeline.first else other + mine
        for gradient, piece in zip(ours, total.split([g.numel() for g in ours]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def _stretches(stored: Stored, first: int, number: int) -> Iterator[tuple[str, int, int, slice]]:
    """Of a parameter of which `number` rows from `first` on are here, for every stretch: its name, its rows, which of
    them is the first one here, and where they lie in those here. May be none."""
    start = 0
    for name, rows in stored:
        assert rows is not None, f"{name}: stretches and single indices in one parameter"
        here = slice(*(min(max(edge - first, 0), number) for edge in (start, start + rows)))
        yield name, rows, min(max(first - start, 0), rows), here
        start += rows


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
