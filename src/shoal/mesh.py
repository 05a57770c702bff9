"""Ranks, the view of who takes part, and the groups that one layout needs.

A mesh is built from a store and a view and holds everything that talks between ranks, so a process can
close it and build another for a smaller view without being restarted.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from shoal import device, operations
from shoal.connections import Connections, PeerGone
from shoal.job.layout import AXES, Layout

# How often one who waits for others looks whether they are still there; and seconds that an operation may still take
# after a connection has ended: its peer may have closed in good order, with the last bytes on their way.
_GLANCE, _PATIENCE = timedelta(seconds=0.25), 1.0
# Seconds that a rank which has found another host's gone leaves its own connections open: two glances of the others.
_LOOK_AROUND = 0.5

# Sets of axes along which ranks talk.
_TALKING = (
    ("replicas",), ("pipeline",), ("fsdp", "context"), ("context",), ("tensor",), ("context", "tensor"),
    ("replicas", "fsdp", "context", "tensor"), AXES[1:],
)  # fmt: skip


@dataclass(frozen=True)
class Seat:
    """Where this process sits, as its launcher tells it. `member` never changes, also when others leave.

    member: 0 … world - 1 at the start. local: index on this node. neighbours: ranks on this node, also those of other
    groups, such as other workers of a parameter server.
    store: key-value store shared by all members; it outlives any single rank. built: how many meshes of each view's
    number this member has begun here; every mesh has keys of its own in the store.
    """

    member: int
    world: int
    local: int
    neighbours: int
    store: dist.Store
    built: Counter[int] = field(default_factory=Counter, compare=False, repr=False)


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
        # Members that take part in a view have built equally many meshes of it, whenever they came.
        prefix = f"view-{view.number}-{seat.built[view.number]}"
        seat.built[view.number] += 1
        with Connections() as self._connections:
            dist.init_process_group(
                device.backend(self.device),
                store=dist.PrefixStore(prefix, seat.store),
                rank=self.rank,
                world_size=layout.world,
                timeout=timedelta(seconds=timeout),
            )
            # The whole rank grid in one expression: neighbours share what is sent most, matrices and sequences.
            self.grid = torch.arange(layout.world).view([getattr(layout, axis) for axis in AXES])
            place = (self.grid == self.rank).nonzero()[0].tolist()
            self.replica, self.stage, self.fsdp, self.context, self.tensor = place
            self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
            across = set[int]()
            for axes in dict.fromkeys(filter(None, map(self._wide, _TALKING))):
                before = self._connections.opened()
                self._groups[axes] = self._make(axes)
                if axes == ("replicas",):
                    across = self._connections.opened() - before
            self._groups |= self._make_experts() if layout.expert > 1 else {}
        # Descriptors of connections to other replicas; empty where there are no others, and with NCCL.
        self.across_descriptors = self._connections.among(across)
        operations.begin(self._names())
        self._hosts = self._make_hosts(prefix)
        self._open = True
        if device.waits_on_host(self.device):
            atexit.unregister(device.let_go)  # once is enough
            atexit.register(device.let_go)

    def _wide(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the axes that have more than one rank."""
        return tuple(axis for axis in axes if getattr(self.layout, axis) > 1)

    def _make(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        """This rank's group, of those that each set of ranks makes which differ along `axes` only."""
        along = [AXES.index(axis) for axis in axes]
        others = [i for i in range(len(AXES)) if i not in along]
        return self._one_of(self.grid.permute(*others, *along).flatten(0, len(others) - 1).flatten(1))

    def _one_of(self, ranks_GN: torch.Tensor) -> dist.ProcessGroup:
        """This rank's of the groups that are the rows."""
        if len(ranks_GN) == 1:
            return self.everyone
        mine, _ = dist.new_subgroups_by_enumeration(ranks_GN.tolist(), timeout=timedelta(seconds=self.timeout))
        return mine

    def _make_experts(self) -> dict[tuple[str, ...], dist.ProcessGroup]:
        """Across the ranks of one replica's stage, in their order: `expert` neighbours have all experts between them,
        and the ranks at the same place among these neighbours have the same ones."""
        ranks_SRE = self.grid.reshape(-1, self.layout.rest, self.layout.expert)
        groups: dict[tuple[str, ...], dist.ProcessGroup] = {("expert",): self._one_of(ranks_SRE.flatten(0, 1))}
        if self.layout.rest > 1:
            groups[("rest",)] = self._one_of(ranks_SRE.transpose(1, 2).flatten(0, 1))
        return groups

    def _make_hosts(self, prefix: str) -> dict[str, list[int]]:
        """Where ranks are on several hosts: the members behind each address. All ranks call it."""
        if self.seat.neighbours >= self.seat.world or not device.waits_on_host(self.device):
            return {}
        store, hosts = dist.PrefixStore(f"{prefix}-hosts", self.seat.store), dict[str, list[int]]()
        keys = [str(member) for member in self.view.members]
        store.set(str(self.seat.member), self._connections.address())
        store.wait(keys, timedelta(seconds=self.timeout))
        for member, address in zip(self.view.members, store.multi_get(keys), strict=True):
            hosts.setdefault(address.decode(), []).append(member)
        return hosts

    def _names(self) -> dict[str, tuple[str, list[int]]]:
        """For who reads what was recorded: of each group's name, its axes and members."""
        names: dict[str, tuple[str, list[int]]] = {self.everyone.group_name: ("all ranks", [*self.view.members])}
        for axes, group in self._groups.items():
            ranks = [self.view.members[rank] for rank in dist.get_process_group_ranks(group)]
            if group is not self.everyone or len(axes) == 1:
                names[group.group_name] = " × ".join(axes), ranks
        return names

    @property
    def world(self) -> int:
        return self.layout.world

    @property
    def reader(self) -> int:
        """Which of the `layout.readers` parts of the global batch this rank reads."""
        return self.replica * self.layout.fsdp + self.fsdp

    def group(self, *axes: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along these axes only; there must be more than one.

        "expert": those that have all experts between them. "rest": those that have the same ones.
        """
        return self._groups[self._wide(axes)]

    @property
    def across_replicas(self) -> dist.ProcessGroup:
        """The ranks that hold the same piece in every replica."""
        return self.group("replicas")

    @property
    def within_replica(self) -> dist.ProcessGroup:
        """The ranks that hold this rank's replica."""
        return self.group(*AXES[1:])

    @property
    def sharers(self) -> dist.ProcessGroup:
        """The ranks over which `zero` spreads this rank's parameters."""
        return self.group("fsdp", "context")

    @property
    def everyone(self) -> dist.ProcessGroup:
        group = dist.group.WORLD
        assert group is not None
        return group

    def decide(self, layout: Layout) -> None:
        """What the layout left to be measured is known; its ranks stay as they are."""
        assert all(getattr(layout, axis) == getattr(self.layout, axis) for axis in AXES)
        self.layout = layout

    def of_replicas(self, value: float) -> list[float]:
        """Of each replica, the largest of what its ranks call this with; 0 or more."""
        values = torch.zeros(self.layout.replicas, dtype=torch.float64, device=self.device)
        values[self.replica] = value
        self.wait(dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.everyone, async_op=True))
        return values.tolist()

    def largest(self, value: float) -> float:
        """The largest of what the ranks call this with."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.wait(dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.everyone, async_op=True))
        return tensor.item()

    def wait(self, work: dist.Work | None) -> None:
        """Until a collective of this mesh, begun with async_op=True, is done (on a GPU: is queued).

        Raises RuntimeError where it fails, PeerGone where a rank has gone: soon, whatever the timeout is. Where there
        are several hosts, it names the lost one.
        """
        assert work is not None
        if not device.waits_on_host(self.device):
            work.wait()
            return
        seen, lost = math.inf, ""
        while True:
            try:
                work.wait(_GLANCE)
                return
            except RuntimeError:
                if work.is_completed():  # else only our glance has timed out
                    break
            if time.monotonic() > seen + _PATIENCE:
                raise PeerGone(lost)
            if seen == math.inf and self._connections.broken():
                lost, seen = self._lost(), time.monotonic()
        try:
            work.wait()  # says how it ended: it may have been done a moment after the glance
        except RuntimeError as error:
            if lost := lost or self._lost():
                raise PeerGone(lost) from error
            raise

    def swap(self, group: dist.ProcessGroup, peer: int, mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
        """Sends tensors to a rank of the group, which calls it too, and waits for its own, of the same shapes.

        Returns the seconds until the first of these was here; 0 on a GPU, whose queue waits and not the process.
        """
        both = [
            dist.P2POp(call, tensor, group=group, group_peer=peer)
            for call, tensors in ((dist.isend, mine), (dist.irecv, theirs))
            for tensor in tensors
            if tensor.numel()
        ]
        start, waited = time.perf_counter(), 0.0
        works = dist.batch_isend_irecv(operations.noted(both))
        # Not `wait`: gloo closes the connection of a send or receive whose wait is cut short.
        if device.waits_on_host(self.device):
            works.pop(len(both) // 2).wait()
            waited = time.perf_counter() - start
        for work in works:
            work.wait()
        return waited

    def _lost(self) -> str:
        """`10.77.0.3 (rank 2)`: who has ended connections to this rank; empty if nobody has, or all is one host."""
        ended = sorted(self._connections.ended()) if self._hosts else []
        if ended:
            # By then the others have looked too, and found these gone, not us.
            time.sleep(_LOOK_AROUND)
        return " and ".join(f"{address} ({self._members_at(address)})" for address in ended)

    def _members_at(self, address: str) -> str:
        ranks = self._hosts.get(address, [])
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "an unknown rank"

    def abandon(self) -> None:
        """After a failure: breaks off whatever is under way, also for those who wait for this rank, then closes.

        Never waits: an operation that hangs on a lost rank ends by its timeout, in the background.
        """
        groups = [*{id(group): group for group in (*self._groups.values(), self.everyone)}.values()]
        for group in groups:
            group.abort()
        self._connections.sever()
        # Whoever drops the last reference to a group of gloo's waits for its operations. This thread does not end with
        # the process, so there nobody does.
        held = threading.Timer(self.timeout + 1, groups.clear)
        held.daemon = True
        held.start()
        self.close()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes it; after the loss of another rank, also what this one still waits for, or the process would not end:
        who drops a group of gloo's, as every process does in the end, waits for its operations."""
        if error is not None and device.peer_gone(error):
            self.abandon()
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
