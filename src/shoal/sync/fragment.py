"""A part of the model that replicas exchange at once: the weights they have in common, and how far each has moved."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shoal.shard import Shard


class Fragment:
    """The common weights of some shards of this rank, and the outer optimizer's velocity, each in one flat tensor.

    learned: those that gradients reach. fixed: those that move otherwise; of them replicas take the mean.
    """

    def __init__(self, learned: list[Shard], fixed: list[Shard], device: torch.device):
        self.learned = [s for s in learned if s.local.numel()]
        self.shards = [*self.learned, *(s for s in fixed if s.local.numel())]
        like = self.shards[0].local if self.shards else torch.empty(0, device=device)
        self.common_N = like.new_zeros(sum(s.local.numel() for s in self.shards))
        self.velocity_n = like.new_zeros(sum(s.local.numel() for s in self.learned))

    @torch.no_grad()
    def agree(self) -> None:
        """What this replica has is what all have in common."""
        for shard, piece in _pieces(self.shards, self.common_N):
            piece.copy_(shard.local)

    @torch.no_grad()
    def moved(self) -> Tensor:
        """Pseudo-gradient: the common weights minus this replica's."""
        moved_N = self.common_N.clone()
        for shard, piece in _pieces(self.shards, moved_N):
            piece.sub_(shard.local)
        return moved_N

    @torch.no_grad()
    def step(self, mean_N: Tensor, lr: float, momentum: float) -> None:
        """The outer step from the mean pseudo-gradient, which is used up: SGD, its momentum Nesterov's.

        Source: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models", algorithm 1;
        the velocity as in `torch.optim.SGD`.
        """
        mean_n = mean_N[: len(self.velocity_n)]
        if momentum:
            self.velocity_n.mul_(momentum).add_(mean_n)
            mean_n.add_(self.velocity_n, alpha=momentum)
        mean_n.mul_(lr)
        self.common_N.sub_(mean_N)

    @torch.no_grad()
    def mix(self, own: float) -> None:
        """This replica goes on from the common weights. own: how much of its own it keeps, from 0 to 1."""
        for shard, piece in _pieces(self.shards, self.common_N):
            if own:
                shard.local.mul_(own).add_(piece, alpha=1 - own)
            else:
                shard.local.copy_(piece)

    def squares(self, flat_N: Tensor) -> Tensor:
        """Of the learned in a flat tensor, each logical number once in a replica; a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=flat_N.device)
        for shard, piece in _pieces(self.learned, flat_N):
            if shard.counted:
                total += piece.double().square().sum()
        return total

    def common(self) -> list[Shard]:
        """The common weights, under their own names."""
        return self.like(self.common_N)

    def like(self, flat_N: Tensor) -> list[Shard]:
        """What a flat tensor holds of the shards, under their own names."""
        return [replace(shard, local=piece, grad=None) for shard, piece in _pieces(self.shards, flat_N)]

    def velocity(self) -> list[Shard]:
        """The outer optimizer's, as `outer.<name>`."""
        return named("outer", self.learned, self.velocity_n)


def named(slot: str, shards: list[Shard], flat_N: Tensor) -> list[Shard]:
    """What a flat tensor holds of these shards, as `<slot>.<name>`; saved by whoever saves the shards."""
    return [replace(s, name=f"{slot}.{s.name}", local=piece, grad=None) for s, piece in _pieces(shards, flat_N)]


def _pieces(shards: list[Shard], flat_N: Tensor) -> list[tuple[Shard, Tensor]]:
    """Each shard with its place in a flat tensor, a view of its shape."""
    sizes = [s.local.numel() for s in shards]
    pieces = flat_N[: sum(sizes)].split(sizes)
    return [(shard, piece.view(shard.local.shape)) for shard, piece in zip(shards, pieces, strict=True)]
