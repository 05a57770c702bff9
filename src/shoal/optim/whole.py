"""Matrices of which ranks have pieces, each whole on one rank for as long as something is computed of it.

What an optimizer computes of whole matrices cannot be computed piece by piece, and the answer shall be that of one
process. So the pieces of a matrix go to one of the ranks of a replica that have any, it computes, and everybody gets
its own pieces of the result. Gathered like this, but computed on every rank of a group: Liu et al. 2025, "Muon is
Scalable for LLM Training", section 2.3 (arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from shoal.mesh import Mesh
from shoal.shard import Shard

T = TypeVar("T")

# Numbers that a rank has whole at once, the last matrix not counted: what is computed at a time takes a few times that.
_AT_ONCE = 1 << 24


class Held(msgspec.Struct, frozen=True):
    """A piece of a matrix that a rank has, as `Shard` describes it. shape: of the piece."""

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    counted: bool


@dataclass(frozen=True)
class Place:
    """Where a piece lies. rank: in the replica. index: among the pieces of that rank."""

    rank: int
    index: int
    piece: Held

    def of(self, whole_NM: Tensor) -> Tensor:
        """A view of what it has of the matrix."""
        ends = zip(self.piece.offsets, self.piece.shape, strict=True)
        return whole_NM[tuple(slice(start, start + size) for start, size in ends)]


@dataclass
class Matrix:
    """places: all pieces of it in the replica, copies too. worker: the rank that has it whole."""

    shape: tuple[int, ...]
    places: list[Place] = field(default_factory=list)
    worker: int = 0

    @property
    def cost(self) -> int:
        """Of the products of an iteration, in some unit."""
        low, high = sorted(self.shape)
        return low * low * (2 * high + low)


class Wholes:
    """The matrices that these shards of a replica's ranks are pieces of, and which rank computes with which of them.

    The work is shared out once, the same on every rank: the most expensive matrix first, to whoever of those that have
    pieces of it has least to do so far. Replicas do not share it: each computes all of its own.
    """

    def __init__(self, shards: Sequence[Shard], mesh: Mesh | None):
        """To be called on all ranks of a replica. mesh: None where the shards are whole, on one rank."""
        self._mesh = mesh if mesh is not None and mesh.layout.ranks_per_replica > 1 else None
        mine = [Held(s.name, s.global_shape, s.offsets, tuple(s.local.shape), s.counted) for s in shards]
        everyone = [mine] if self._mesh is None else _told(mine, self._mesh)
        self._rank = 0 if self._mesh is None else self._mesh.within_replica.rank()
        self._ranks, self._number = len(everyone), len(mine)
        self.rounds = list(shared_out(everyone))

    def map(self, pieces: Sequence[Tensor], function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        """This rank's pieces of what `function` makes of each whole matrix, in the order of the shards.

        pieces: of `dtype`, in that order. function: gives a new tensor of the same shape. To be called on all ranks of
        a replica. Two collectives for every `_AT_ONCE` numbers of a rank.
        """
        made: dict[int, Tensor] = {}
        for matrices in self.rounds:
            wholes = self._gathered(matrices, pieces, dtype)
            results = [function(whole_NM) for whole_NM in wholes]
            made |= self._scattered(matrices, results, dtype)
        return [made[index] for index in range(self._number)]

    def _gathered(self, matrices: list[Matrix], pieces: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The matrices of which this rank is the worker."""
        leaving = self._by_rank((m.worker, pieces[p.index]) for m, p in self._mine(matrices) if p.piece.counted)
        expected = self._by_rank((p.rank, p.piece.shape) for m, p in self._worked(matrices) if p.piece.counted)
        arrived = [iter(tensors) for tensors in self._swap(matrices, leaving, expected, dtype)]
        wholes = []
        for matrix in (m for m in matrices if m.worker == self._rank):
            sources = [place for place in matrix.places if place.piece.counted]
            parts = [next(arrived[place.rank]) for place in sources]
            if len(parts) > 1:
                whole_NM = parts[0].new_empty(matrix.shape)
                for place, part in zip(sources, parts, strict=True):
                    place.of(whole_NM).copy_(part)
                parts = [whole_NM]
            wholes += parts
        return wholes

    def _scattered(self, matrices: list[Matrix], results: list[Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """This rank's pieces of what all workers have made, by their index."""
        of_matrix = iter(results)
        whole_of = {id(m): next(of_matrix) for m in matrices if m.worker == self._rank}
        leaving = self._by_rank((p.rank, p.of(whole_of[id(m)])) for m, p in self._worked(matrices))
        expected = self._by_rank((m.worker, p.piece.shape) for m, p in self._mine(matrices))
        arrived = [iter(tensors) for tensors in self._swap(matrices, leaving, expected, dtype)]
        return {place.index: next(arrived[m.worker]) for m, place in self._mine(matrices)}

    def _mine(self, matrices: list[Matrix]) -> Iterator[tuple[Matrix, Place]]:
        """What this rank has pieces of, and where."""
        return ((m, place) for m in matrices for place in m.places if place.rank == self._rank)

    def _worked(self, matrices: list[Matrix]) -> Iterator[tuple[Matrix, Place]]:
        """What this rank is the worker of, and where there are pieces of it."""
        return ((m, place) for m in matrices if m.worker == self._rank for place in m.places)

    def _by_rank(self, pairs: Iterator[tuple[int, T]]) -> list[list[T]]:
        found: list[list[T]] = [[] for _ in range(self._ranks)]
        for rank, what in pairs:
            found[rank].append(what)
        return found

    def _swap(
        self,
        matrices: list[Matrix],
        leaving: list[list[Tensor]],
        expected: list[list[tuple[int, ...]]],
        dtype: torch.dtype,
    ) -> list[list[Tensor]]:
        """From every rank what it has for this one, tensors of the shapes that are expected. Own ones stay as they are;
        nothing is sent where all pieces lie with their workers."""
        if self._mesh is None or all(p.rank == m.worker for m in matrices for p in m.places):
            return leaving
        others = [[] if rank == self._rank else tensors for rank, tensors in enumerate(leaving)]
        shapes = [[] if rank == self._rank else s for rank, s in enumerate(expected)]
        sent, received = [sum(t.numel() for t in o) for o in others], [sum(map(prod, s)) for s in shapes]
        empty = torch.empty(0, dtype=dtype, device=self._mesh.device)
        out_N = torch.cat([empty, *(t.flatten() for tensors in others for t in tensors)])
        in_N = out_N.new_empty(sum(received))
        group = self._mesh.within_replica
        self._mesh.wait(dist.all_to_all_single(in_N, out_N, received, sent, group=group, async_op=True))
        parts = [part_N.split([prod(s) for s in of]) for part_N, of in zip(in_N.split(received), shapes, strict=True)]
        found = [[t.view(s) for t, s in zip(ts, of, strict=True)] for ts, of in zip(parts, shapes, strict=True)]
        found[self._rank] = leaving[self._rank]
        return found


def shared_out(everyone: list[list[Held]]) -> Iterator[list[Matrix]]:
    """All matrices with their workers, some at a time. everyone: what each rank of the replica has."""
    found: dict[str, Matrix] = {}
    for rank, held in enumerate(everyone):
        for index, piece in enumerate(held):
            found.setdefault(piece.name, Matrix(piece.global_shape)).places.append(Place(rank, index, piece))
    rounds: list[list[Matrix]] = []
    cost, numbers = [0] * len(everyone), [0] * len(everyone)
    for name, matrix in sorted(found.items(), key=lambda item: (-item[1].cost, item[0])):
        counted = sum(prod(place.piece.shape) for place in matrix.places if place.piece.counted)
        assert counted == prod(matrix.shape), f"{name} is not whole, or some of it counts twice"
        worker = min((place.rank for place in matrix.places), key=lambda rank: (cost[rank], rank))
        matrix.worker = worker
        number = numbers[worker] // _AT_ONCE
        cost[worker] += matrix.cost
        numbers[worker] += prod(matrix.shape)
        rounds += [[] for _ in range(number + 1 - len(rounds))]
        rounds[number].append(matrix)
    return filter(None, rounds)


def _told(mine: list[Held], mesh: Mesh) -> list[list[Held]]:
    """What each rank of the replica has; all call it."""
    group = mesh.within_replica
    told = torch.frombuffer(bytearray(msgspec.msgpack.encode(mine)), dtype=torch.uint8).to(mesh.device)
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=mesh.device)
    sizes[group.rank()] = len(told)
    mesh.wait(dist.all_reduce(sizes, group=group, async_op=True))
    padded = told.new_zeros(int(sizes.max()))
    padded[: len(told)] = told
    everyone = [torch.empty_like(padded) for _ in sizes]
    mesh.wait(dist.all_gather(everyone, padded, group=group, async_op=True))
    rows = zip(everyone, sizes.tolist(), strict=True)
    return [msgspec.msgpack.decode(bytes(row[:size].tolist()), type=list[Held]) for row, size in rows]
