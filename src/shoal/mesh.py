"""Ranks, the view of who takes part, and the groups that one layout needs.

A mesh is built from a store and a view and holds everything that talks between ranks, so a process can
close it and build another for a smaller view without being restarted.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shoal import device
from shoal.connections import Connections
from shoal.job.layout import Layout

# How often one who waits for others looks whether they are still there; and seconds that an operation may still take
# after a connection has ended: its peer may have closed in good order, with the last bytes on their way.
_GLANCE, _PATIENCE = timedelta(seconds=0.25), 1.0


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
        with Connections() as self._connections:
            dist.init_process_group(
                device.backend(self.device),
                store=dist.PrefixStore(f"view-{view.number}", seat.store),
                rank=self.rank,
                world_size=layout.world,
                timeout=timedelta(seconds=timeout),
            )
            # The whole rank grid in one expression: neighbouring ranks share a replica.
            grid_RF = torch.arange(layout.world).view(layout.replicas, layout.fsdp)
            self.grid = DeviceMesh(self.device.type, grid_RF, mesh_dim_names=("replicas", "fsdp"))
        self._open = True

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

    def largest(self, value: float) -> float:
        """The largest of what the ranks call this with."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.wait(dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.everyone, async_op=True))
        return tensor.item()

    def wait(self, work: dist.Work | None) -> None:
        """Until a collective of this mesh, begun with async_op=True, is done (on a GPU: is queued).

        Raises RuntimeError where it fails, ConnectionError where a rank has gone: soon, whatever the timeout is.
        """
        assert work is not None
        if not device.waits_on_host(self.device):
            work.wait()
            return
        seen = math.inf
        while True:
            try:
                work.wait(_GLANCE)
                return
            except RuntimeError:
                if work.is_completed():  # else only our glance has timed out
                    work.wait()  # says how it ended: it may have been done a moment after the glance
                    return
            if time.monotonic() > seen + _PATIENCE:
                raise ConnectionError("connection closed by peer: a rank is gone in the middle of a collective")
            if seen == math.inf and self._connections.broken():
                seen = time.monotonic()

    def abandon(self) -> None:
        """After a failure: breaks off whatever is under way, also for those who wait for this rank, then closes.

        Never waits: an operation that hangs on a lost rank ends by its timeout, in the background.
        """
        groups = [self.across_replicas, self.fsdp.get_group(), self.everyone]
        for group in groups:
            group.abort()
        self._connections.sever()
        # Whoever drops the last reference to a group of gloo's waits for its operations.
        held = threading.Timer(self.timeout + 1, groups.clear)
        held.daemon = True
        held.start()
        self.close()

    def close(self) -> None:
        """Ends all groups, once. Never waits for members that are gone."""
        if self._open:
            self._open = False
            self._connections.close()
            dist.destroy_process_group()


def build(layout: Layout, seat: Seat, view: View | None = None, timeout: float = 600.0) -> Mesh:
    """The mesh of `layout` among `view` (default: everybody). `timeout` seconds bound every collective."""
    return Mesh(layout, seat, view or View(0, tuple(range(seat.world))), timeout)
