"""The norm of a gradient that is spread over shards."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.shard import Shard


def sum_of_squares(shards: list[Shard]) -> Tensor:
    """Sum of squares of these shards' gradients, a float64 scalar. Sum it over the ranks that share a replica."""
    gradients = [s.grad for s in shards if s.grad is not None and s.grad.numel()]
    if not gradients:
        device = shards[0].local.device if shards else None
        return torch.zeros((), dtype=torch.float64, device=device)
    # One norm a tensor in its own precision, then float64: a long sum of squares in fp32 loses digits.
    norms = torch.stack([n.double() for n in torch._foreach_norm(gradients)])
    return norms.square().sum()
