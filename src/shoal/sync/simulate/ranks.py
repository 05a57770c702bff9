"""Replicas of one rank each in one process: what they send each other goes from tensor to tensor, and takes simulated
time. The code of a sync runs on it as it does on ranks of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.job.layout import Layout
from shoal.mesh import Mesh, View
from shoal.sync.simulate.links import Links
from shoal.sync.simulate.turns import Turns


class _Operation:
    """What some ranks do together. given: of each that has begun, its input and output; ends: when each is done."""

    def __init__(self, kind: str):
        self.kind = kind
        self.given: dict[int, tuple[Tensor, Tensor]] = {}
        self.begun: dict[int, float] = {}
        self.ends: dict[int, float] = {}


class Network:
    """Operations under way among the ranks of `turns`, over `links`."""

    def __init__(self, turns: Turns[Any], links: Links):
        self.turns, self.links = turns, links
        self.ranks = len(turns.now)
        self._open: dict[tuple[tuple[int, ...], int], _Operation] = {}
        self._count = Counter[tuple[int, tuple[int, ...]]]()

    def begin(self, rank: int, members: tuple[int, ...], kind: str, mine: Tensor, out: Tensor) -> _Work:
        """The next operation of these ranks, of which each begins as many, of the same kinds, in the same order.

        kind: `all_to_all`, `all_gather`, `swap` (of two), or of an all-reduce `sum` or `max`.
        """
        key = members, self._count[rank, members]
        self._count[rank, members] += 1
        operation = self._open.setdefault(key, _Operation(kind))
        assert operation.kind == kind, f"rank {rank} begins {kind} where others began {operation.kind}"
        operation.given[rank], operation.begun[rank] = (mine, out), self.turns.now[rank]
        if len(operation.given) == len(members):
            del self._open[key]
            self._do(operation, members)
        return _Work(self.turns, rank, operation)

    @torch.no_grad()
    def _do(self, operation: _Operation, members: Sequence[int]) -> None:
        given, size = [operation.given[rank] for rank in members], len(members)
        begun, links = [operation.begun[rank] for rank in members], self.links
        mine, out = [one for one, _ in given], [other for _, other in given]
        nbytes = mine[0].numel() * mine[0].element_size()
        assert all(tensor.shape == mine[0].shape for tensor in mine), f"{operation.kind} of unlike tensors"
        if operation.kind == "swap":
            # Each is the other's.
            values, ends = mine[::-1], [links.pair(members[0], members[1], nbytes, max(begun))] * 2
        elif operation.kind == "all_to_all":
            rows = [tensor.chunk(size) for tensor in mine]
            values = [torch.cat([row[i] for row in rows]) for i in range(size)]
            ends = links.direct(nbytes // size, begun)
        elif operation.kind == "all_gather":
            values, ends = [torch.cat(mine)] * size, links.ring(nbytes, begun, size - 1)
        else:
            values, ends = [_total(operation.kind, mine)] * size, links.ring(-(-nbytes // size), begun, 2 * (size - 1))
        # Some outputs are inputs, too.
        for tensor, value in zip(out, [value.clone() for value in values], strict=True):
            tensor.copy_(value.view_as(tensor))
        operation.ends = dict(zip(members, ends, strict=True))


def _total(kind: str, mine: list[Tensor]) -> Tensor:
    """In the order of ranks; a real all-reduce goes by a ring, whose sums may differ in the last bits."""
    total = mine[0].clone()
    for tensor in mine[1:]:
        total = total + tensor if kind == "sum" else torch.maximum(total, tensor)
    return total


class _Work(dist.Work):
    """One rank's part of an operation."""

    def __init__(self, turns: Turns[Any], rank: int, operation: _Operation):
        super().__init__()
        self._turns, self._rank, self._operation = turns, rank, operation

    def is_completed(self) -> bool:
        return bool(self._operation.ends)

    def wait(self, timeout: Any = None) -> bool:
        """However long it takes: simulated time."""
        self._turns.wait(self._rank, lambda: self._operation.ends.get(self._rank))
        return True


class Group(dist.ProcessGroup):
    """All ranks, as one of them sees it: what `torch.distributed` calls of a group, as (output, input, …)."""

    def __init__(self, rank: int, network: Network):
        # Torch's stubs know only the one that takes a store.
        init: Any = super().__init__
        init(rank, network.ranks)
        self._rank, self._network, self._members = rank, network, tuple(range(network.ranks))

    def getBackendName(self) -> str:
        return "simulated"

    def allreduce(self, *given: Any, **options: Any) -> dist.Work:
        (tensor,), how = given
        kind = "sum" if how.reduceOp == dist.ReduceOp.SUM else "max"
        return self._network.begin(self._rank, self._members, kind, tensor, tensor)

    def all_to_all_single(self, *given: Any, **options: Any) -> dist.Work:
        out, mine, received, sent, _ = given
        assert not received, "equal parts"
        assert not sent, "equal parts"
        return self._network.begin(self._rank, self._members, "all_to_all", mine, out)

    def all_gather_single(self, *given: Any, **options: Any) -> dist.Work:
        out, mine, _ = given
        return self._network.begin(self._rank, self._members, "all_gather", mine, out)

    # Before torch 2.13.
    alltoall_base: Any = all_to_all_single
    _allgather_base: Any = all_gather_single


class SimulatedMesh(Mesh):
    """A mesh of replicas of one rank each, of which it is one's; on the CPU."""

    def __init__(self, layout: Layout, rank: int, network: Network):
        # Nothing of what makes groups of processes.
        assert layout.ranks_per_replica == 1, "a simulated replica is one rank"
        assert layout.replicas == network.ranks
        self.layout, self.rank, self.replica = layout, rank, rank
        self.view = View(0, tuple(range(layout.replicas)))
        self.stage = self.fsdp = self.context = self.tensor = 0
        self.device = torch.device("cpu")
        self._network, self._group = network, Group(rank, network)
        self._groups = {("replicas",): self._group}
        self.across_descriptors = []

    @property
    def everyone(self) -> dist.ProcessGroup:
        return self._group

    def wait(self, work: dist.Work | None) -> None:
        assert work is not None
        work.wait()

    def swap(self, group: dist.ProcessGroup, peer: int, mine: list[Tensor], theirs: list[Tensor]) -> float:
        pair, start = (min(self.rank, peer), max(self.rank, peer)), self._network.turns.now[self.rank]
        first, *others = [
            self._network.begin(self.rank, pair, "swap", one, other)
            for one, other in zip(mine, theirs, strict=True)
            if one.numel()
        ]
        first.wait()
        waited = self._network.turns.now[self.rank] - start
        for work in others:
            work.wait()
        return waited

    def abandon(self) -> None:
        self.close()

    def close(self) -> None:
        """There is nothing to end."""
