"""Ranks, the view of who takes part, and the groups that one layout needs.

A mesh is built from a store and a view and holds everything that talks between ranks, so a process can
close it and build another for a smaller view without being restarted.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shoal import device
from shoal.job.layout import Layout


@dataclass(frozen=True)
class Seat:
    """Where this process sits, as its launcher tells it. `member` never changes, also when others leave.

    member: 0 … world - 1 at the start. local: index on this node. neighbours: ranks on this node.
    store: key-value store shared by all members; it outlives any single rank.
    """

    member: int
    world: int
    local: int
    neighbours: int
    store: dist.Store


@dataclass(frozen=True)
class View:
    """Who takes part. A member's rank is its place in `members`; `number` rises with every change."""

    number: int
    members: tuple[int, ...]


class Mesh:
    """The groups of one layout among the members of one view. Close it before building the next."""

    def __init__(self, layout: Layout, seat: Seat, view: View, timeout: float):
        assert layout.world == len(view.members), f"layout {layout} does not fit {view}"
        self.layout, self.seat, self.view, self.timeout = layout, seat, view, timeout
        self.rank = view.members.index(seat.member)
        self.device = device.of_rank(seat.local)
        dist.init_process_group(
            device.backend(self.device),
            store=dist.PrefixStore(f"view-{view.number}", seat.store),
            rank=self.rank,
            world_size=layout.world,
            timeout=timedelta(seconds=timeout),
        )
        self._open = True
        # The whole rank grid in one expression: neighbouring ranks share a replica.
        grid_RF = torch.arange(layout.world).view(layout.replicas, layout.fsdp)
        self.grid = DeviceMesh(self.device.type, grid_RF, mesh_dim_names=("replicas", "fsdp"))

    @property
    def world(self) -> int:
        return self.layout.world

    @property
    def fsdp(self) -> DeviceMesh:
        """The ranks that share this rank's replica."""
        return self.grid["fsdp"]

    @property
    def replica(self) -> int:
        return self.rank // self.layout.fsdp

    @property
    def across_replicas(self) -> dist.ProcessGroup:
        """The ranks that hold the same piece in every replica."""
        return self.grid.get_group("replicas")

    @property
    def everyone(self) -> dist.ProcessGroup:
        group = dist.group.WORLD
        assert group is not None
        return group

    def abandon(self) -> None:
        """After a failure: breaks off whatever is under way, then closes. Tells the others that something is wrong:
        whoever waits for this rank's data sees the connection close."""
        for group in (self.across_replicas, self.fsdp.get_group(), self.everyone):
            group.abort()
        self.close()

    def close(self) -> None:
        """Ends all groups, once. Never waits for members that are gone."""
        if self._open:
            self._open = False
            dist.destroy_process_group()
            del self.grid  # it holds the groups, and they their connections
            gc.collect()


def build(layout: Layout, seat: Seat, view: View | None = None, timeout: float = 600.0) -> Mesh:
    """The mesh of `layout` among `view` (default: everybody). `timeout` seconds bound every collective."""
    return Mesh(layout, seat, view or View(0, tuple(range(seat.world))), timeout)
