"""A small real problem for the simulated workers: least squares, in float64, its parameters spread over the shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.job.optim import OptimOptions
from shoal.sync.server.messages import Key, Piece, Range
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import place
from shoal.sync.server.rules import Rules
from shoal.sync.server.shard import ServerShard
from shoal.sync.server.staleness import token_schedule
from shoal.sync.server.worker import Pushed

_ROWS, _FEATURES, _BLOCK = 512, 32, 8


class LeastSquares:
    """½ (x·w − y)², averaged over 512 samples of 32 features; sample i of the job is row i mod 512.

    Features differ in scale by 10, so that the curvature differs by 100; y has noise, so that the least loss is not 0.
    """

    def __init__(self, rules: Rules, options: OptimOptions, shards: int, steps: int, global_batch: int, seed: int):
        """steps, global_batch: for the schedule of the learning rate."""
        self.rules, self.options, self.steps = rules, options, steps
        self.rate = token_schedule(options, global_batch, steps)
        generator = torch.Generator().manual_seed(seed)
        scale_F = torch.logspace(0, -1, _FEATURES, dtype=torch.float64)
        self.x_NF = torch.randn(_ROWS, _FEATURES, dtype=torch.float64, generator=generator) * scale_F
        true_F = torch.randn(_FEATURES, dtype=torch.float64, generator=generator)
        noise_N = torch.randn(_ROWS, dtype=torch.float64, generator=generator)
        self.y_N = self.x_NF @ true_F + 0.1 * noise_N
        names = [f"blocks.{i}.weight" for i in range(_FEATURES // _BLOCK)]
        self.values = {name: torch.zeros(_BLOCK, dtype=torch.float64) for name in names}
        self.placement = place({name: (_BLOCK,) for name in names}, shards, itemsize=8)

    def held(self, shard: int) -> Parameters:
        return Parameters(blocks(self.values, self.placement[shard]), self.rules, self.options, self.steps)

    def copy(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensor.clone() for tensor in tensors]

    def gradient(
        self, pulled: Mapping[int, Sequence[Tensor]], samples: Range, token: tuple[int, Key]
    ) -> tuple[Mapping[int, Pushed], float, float]:
        """(what goes to each shard: sums over samples; number of samples; sum of losses)."""
        values = {
            block.name: tensor
            for shard, tensors in pulled.items()
            for block, tensor in zip(self.placement[shard], tensors, strict=True)
        }
        rows = torch.arange(*samples) % _ROWS
        x_BF = self.x_NF[rows]
        error_B = x_BF @ self._whole(values) - self.y_N[rows]
        parts = dict(zip(self.values, (x_BF.T @ error_B).split(_BLOCK), strict=True))
        pushed = {
            shard: Pushed(self.held_pieces(shard), tuple(parts[block.name] for block in placed))
            for shard, placed in enumerate(self.placement)
        }
        return pushed, float(len(rows)), 0.5 * error_B.square().sum().item()

    def held_pieces(self, shard: int) -> tuple[Piece, ...]:
        return tuple(Piece(block.name, (0,), (_BLOCK,)) for block in self.placement[shard])

    def loss(self, shards: Sequence[ServerShard]) -> float:
        """Of the weights that the shards hold, over all samples."""
        values: dict[str, Tensor] = {}
        for shard in shards:
            assert isinstance(shard.held, Parameters), "what this problem's shards hold"
            values |= {s.name: s.local for s in shard.held.shards}
        return self.loss_of(values)

    def loss_of(self, values: Mapping[str, Tensor]) -> float:
        return 0.5 * (self.x_NF @ self._whole(values) - self.y_N).square().mean().item()

    def _whole(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values[name] for name in self.values])
