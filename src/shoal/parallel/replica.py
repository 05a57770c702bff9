"""One replica of the model, as this rank sees it: its shards, and how their gradients come about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from shoal.mesh import Mesh
from shoal.parallel.buckets import Buckets
from shoal.parallel.fsdp import Sharded, local_gradient, shard_of
from shoal.shard import Shard

B = TypeVar("B")


@dataclass
class Tally:
    """What this rank counted in one step. loss_sum, weight: sums over its tokens (float64 scalars on the device)."""

    loss_sum: Tensor
    weight: Tensor
    stop: bool = False


class Replica(Generic[B]):
    """A model on meta, cut for this rank's place in the mesh, then given memory.

    Between `gradients` and the update, every shard's `.grad` is the SUM over the tokens of this rank's batch
    (with fsdp: over the batches of all its replica's ranks), not yet normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        mesh: Mesh,
        *,
        compute: torch.dtype | None = None,
        bucket_bytes: int = 25 << 20,
    ):
        """blocks: the units in which parameters are gathered. compute: dtype of matrix products, None = as stored."""
        self.module, self.mesh = model, mesh
        self._on_bucket: Callable[[Tensor], None] | None = None
        between_replicas = self._bucket if mesh.layout.replicas > 1 else None
        self._sharded: Sharded | None = None
        self._buckets: Buckets | None = None
        if mesh.layout.fsdp > 1:
            self._sharded = Sharded(model, list(blocks), mesh.fsdp, mesh.layout.zero, compute, between_replicas)
        model.to_empty(device=mesh.device)
        self._parameters = list(model.parameters())
        if self._sharded is not None:
            self._sharded.hold(self._parameters)
        elif between_replicas is not None:
            self._buckets = Buckets(self._parameters, bucket_bytes, between_replicas)
        self._shards = self._describe()
        self._share_saving()

    def _describe(self) -> list[Shard]:
        if self._sharded is not None:
            return [shard_of(name, p) for name, p in self.module.named_parameters()]
        return [Shard(name, tuple(p.shape), (0,) * p.ndim, p.detach()) for name, p in self.module.named_parameters()]

    def _share_saving(self) -> None:
        """Equal pieces lie in every replica; they take turns in saving them."""
        for index, shard in enumerate(self._shards):
            shard.owner = index % self.mesh.layout.replicas == self.mesh.replica

    def move(self, mesh: Mesh) -> None:
        """The same pieces in another mesh, after a change in the number of replicas."""
        assert self._sharded is None, "fully_shard is bound to the groups it was built with"
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

    def gradients(self, batches: Sequence[B], loss: Callable[[nn.Module, B], tuple[Tensor, Tensor]]) -> Tally:
        """Forward and backward over the micro-batches.

        loss: (module, batch) -> (loss summed over the batch's tokens, weight of those tokens).
        """
        for parameter in self._parameters:
            parameter.grad = None
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        weight_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for index, batch in enumerate(batches):
            with self._backward(last=index == len(batches) - 1):
                loss_value, weight = loss(self.module, batch)
                loss_value.backward()
            loss_sum += loss_value.detach()
            weight_sum += weight
        return Tally(loss_sum, weight_sum)

    @contextmanager
    def _backward(self, last: bool) -> Iterator[None]:
        if self._sharded is not None:
            with self._sharded.backward(last):
                yield
        else:
            with self._buckets.last_backward() if last and self._buckets else nullcontext():
                yield

    def collect(self) -> list[Shard]:
        """The shards with their gradients, once every bucket has been reduced."""
        for shard, parameter in zip(self._shards, self._parameters, strict=True):
            shard.grad = local_gradient(parameter)
        return self._shards
