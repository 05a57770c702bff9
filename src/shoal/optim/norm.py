"""The norm of a gradient that is spread over shards."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.shard import Shard

# Numbers whose squares are added up in the gradient's own precision before float64 takes over. Torch's norm adds up
# whole tensors so: a million numbers in float32 are off by 1e-5, by another 1e-5 where they are cut into shards.
_ROW = 256


def sum_of_squares(shards: list[Shard]) -> Tensor:
    """Sum of squares of these shards' gradients, a float64 scalar. Sum it over the ranks that share a replica.

    A shard that is not `counted` is left out, so that each element of the whole gradient counts once.
    """
    gradients = [s.grad for s in shards if s.counted and s.grad is not None and s.grad.numel()]
    if not gradients:
        device = shards[0].local.device if shards else None
        return torch.zeros((), dtype=torch.float64, device=device)
    rows = [part for gradient in gradients for part in _rows(gradient)]
    norms = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in rows])
    return norms.double().square().sum()


def _rows(gradient: Tensor) -> list[Tensor]:
    flat = gradient.reshape(-1)
    even = flat.numel() // _ROW * _ROW
    return [part for part in (flat[:even].view(-1, _ROW), flat[even:].view(1, -1)) if part.numel()]
