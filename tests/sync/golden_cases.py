"""The mock model of the published trajectories, trained by the real thing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.job.optim import OptimOptions
from shoal.job.sync import SyncOptions
from shoal.optim.update import Update
from shoal.parallel.pieces import Part
from shoal.parallel.replica import Replica
from shoal.sync.local import Local


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))


class Mock(nn.Module):
    """`layers` of one weight each, whose gradient is a constant."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Weight() for _ in range(layers))


def trajectory(seat: meshes.Seat, case: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(this replica's own weights, the common ones) by number of completed steps."""
    mesh = meshes.build(Layout(replicas=case["replicas"]), seat, timeout=60)
    try:
        model = Mock(case["fragments"])
        replica: Replica[None] = Replica({0: Part(model, list(model.layers))}, mesh)
        optim = OptimOptions(
            name="sgd", lr=case["inner_lr"], momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0.0
        )
        steps = max(map(int, case["history"]))
        # The run is longer than what is looked at: what a run does at its end is no part of the trajectory.
        update = Update(replica.shards(), optim, steps + 1)
        options = SyncOptions(
            name="local", every=case["sync_every"], fragments=case["fragments"], delay=case["sync_delay"],
            mix=case["alpha"], outer_lr=case["outer_lr"], outer_momentum=0.0,
        )  # fmt: skip
        sync = Local(mesh, 0.0, None, options)
        sync.attach(replica, update)

        def loss(module: Any, batch: None, hidden: Any) -> Any:
            total = case["grad"] * sum(layer.weight.sum() for layer in module.layers)
            return total, torch.ones((), dtype=torch.float64)

        own, common = {"0": values(replica.held())}, {"0": values(replica.held())}
        for step in range(steps):
            sync.begin(step)
            assert sync.end(replica.gradients([None], loss)).applied
            own[str(step + 1)] = values(replica.held())
            common[str(step + 1)] = values(sync.alike())
        return own, common
    finally:
        mesh.close()


def values(shards: list[Any]) -> list[float]:
    """Of every layer, in their order."""
    return [shard.local.item() for shard in sorted(shards, key=lambda shard: shard.name)]
