"""Sums over replicas of matrices, each as the product of two thin ones: PowerSGD.

Of the sum M of all replicas' matrices arrives P Qᵀ, of rank r: with the directions D of the step before, P = M D, its
columns then made orthonormal, and Q = Mᵀ P, which gives the next D. Both are sums of what each replica has of them, so
an all-reduce makes them, and what arrives is P Pᵀ M: M itself, where M D has its rank. Source: Vogels, Karimireddy &
Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", algorithm 1; error
feedback as in its algorithm 2. Here D has columns of length 1 (what arrives is the same), so that numbers keep their
order of magnitude, and sums take the place of means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.checkpoint.manifest import Tensor as Saved
from shoal.ops.fill import Fill
from shoal.ops.initialise import initialise_
from shoal.parallel.flat import Flat
from shoal.parallel.replica import Replica
from shoal.shard import Shard
from shoal.sync.feedback import Feedback

_NORMAL = Fill(std=1.0)
_SLOT = re.compile(r"lowrank-q(?:@(\d+))?(?:-(\d+))?\.(.+)", re.DOTALL)


class LowRank(NamedTuple):
    """What takes a codec's place. rank: columns of each factor. seed: of the first directions."""

    rank: int
    seed: int = 0


@dataclass(frozen=True)
class Matrix:
    """What goes as two factors. shard: the piece of which parameter it is. copy: as in `Cut`. start: where its numbers
    begin in their flat tensor; of more than two dimensions, all but the first are columns."""

    shard: Shard
    copy: int
    start: int
    rows: int
    columns: int

    def lying_in(self, flat_N: Tensor) -> Tensor:
        """(rows, columns), a view."""
        return flat_N[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


class Factors:
    """How a flat tensor goes: its matrices as two factors each, the rest of what lies in it as it is, which is less.

    first, second: numbers that are summed first (left factors, then the rest), and then (right factors).
    """

    def __init__(self, replica: Replica, place: Flat, rank: int):
        self.rank = rank
        self.matrices: list[Matrix] = []
        self.small: list[Matrix] = []
        """Those among the rest of which other ranks have other columns, and may have enough of them for factors."""
        self._rest: list[slice] = []
        for piece, shard in replica.lying_in(place, torch.empty(place.size, device="meta")):
            start, numbers = int(shard.local.storage_offset()), shard.local.numel()
            rows = shard.local.shape[0] if shard.local.ndim > 1 else numbers
            matrix = Matrix(shard, piece.cut.copy, start, rows, numbers // rows)
            if rank * (matrix.rows + matrix.columns) < numbers:
                self.matrices.append(matrix)
                continue
            self._rest.append(slice(start, start + numbers))
            if shard.local.shape[1:] != shard.global_shape[1:]:
                self.small.append(matrix)
        self._left = [rank * matrix.rows for matrix in self.matrices]
        self._right = [rank * matrix.columns for matrix in self.matrices]
        self.second = sum(self._right)
        self.first = sum(self._left) + sum(part.stop - part.start for part in self._rest)

    def left(self, first_n: Tensor) -> list[Tensor]:
        """Of each matrix (rows, rank), a view."""
        return [part.view(-1, self.rank) for part in first_n[: sum(self._left)].split(self._left)]

    def right(self, second_n: Tensor) -> list[Tensor]:
        """Of each matrix (columns, rank), a view."""
        return [part.view(-1, self.rank) for part in second_n.split(self._right)]

    def rest(self, first_n: Tensor, flat_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What goes as it is: where it is summed, and where it lies."""
        end = sum(self._left)
        for part in self._rest:
            start, end = end, end + part.stop - part.start
            yield first_n[start:end], flat_N[part]


class _Sent(NamedTuple):
    """A flat tensor of which numbers are on their way, the first ones or the second ones."""

    flat_N: Tensor
    place: Flat
    first_n: Tensor
    second_n: Tensor | None
    work: dist.Work | None


class LowRankSum:
    """The life of an `EncodedSum`. Directions are the same on all replicas, and so is all that is made of them and of
    sums: replicas stay equal to the last bit where they all compute alike (kind of processor, number of threads)."""

    def __init__(self, how: LowRank, feedback: bool, replica: Replica):
        """feedback: whether what is lost of a matrix is added to the one that next lies in the same place."""
        self.feedback = Feedback() if feedback else None
        self._factors = {place: Factors(replica, place, how.rank) for place in replica.flats()}
        self._how = how
        self._directions = {place: self._first(place) for place in self._factors}
        self._after: dict[Flat, Tensor] = {}
        self._sent: list[_Sent] = []
        self._turned: list[_Sent] = []

    def _first(self, place: Flat) -> Tensor:
        """The first directions of all matrices of a flat tensor."""
        factors = self._factors[place]
        first_n = place.zeros(factors.second)
        for matrix, known_MR in zip(factors.matrices, factors.right(first_n), strict=True):
            known_MR.copy_(first_directions(matrix, self._how, known_MR))
        return first_n

    @torch.no_grad()
    def start(self, flat_N: Tensor, group: dist.ProcessGroup, place: Flat) -> None:
        """Sends left factors, and what goes as it is. As `EncodedSum.start`."""
        factors = self._factors[place]
        if self.feedback is not None:
            self.feedback.own.add_to(flat_N, place)
        first_n = flat_N.new_empty(factors.first)
        for matrix, left_NR, known_MR in zip(
            factors.matrices, factors.left(first_n), factors.right(self._directions[place]), strict=True
        ):
            torch.mm(matrix.lying_in(flat_N), known_MR, out=left_NR)
        for there, here in factors.rest(first_n, flat_N):
            there.copy_(here)
        self._sent.append(_Sent(flat_N, place, first_n, None, _all_reduce(first_n, group)))

    @torch.no_grad()
    def turn(self, group: dist.ProcessGroup, wait: Callable[[dist.Work], object]) -> None:
        """Waits for the left factors of all that was started, and sends right ones."""
        for flat_N, place, first_n, _, work in self._sent:
            if work is not None:
                wait(work)
            factors = self._factors[place]
            second_n = flat_N.new_empty(factors.second)
            for matrix, left_NR, right_MR in zip(
                factors.matrices, factors.left(first_n), factors.right(second_n), strict=True
            ):
                left_NR.copy_(orthonormal(left_NR))
                torch.mm(matrix.lying_in(flat_N).T, left_NR, out=right_MR)
            own_n = second_n if self.feedback is None else second_n.clone()
            self._turned.append(_Sent(flat_N, place, first_n, second_n, _all_reduce(second_n, group)))
            if self.feedback is not None:
                self._lose(self.feedback, flat_N, place, first_n, own_n)
        self._sent.clear()

    def _lose(self, feedback: Feedback, flat_N: Tensor, place: Flat, first_n: Tensor, own_n: Tensor) -> None:
        """What this replica's own matrices have beside the columns of the left factors. own: its right factors."""
        factors, lost_N = self._factors[place], torch.zeros_like(flat_N)
        for matrix, left_NR, own_MR in zip(factors.matrices, factors.left(first_n), factors.right(own_n), strict=True):
            torch.addmm(matrix.lying_in(flat_N), left_NR, own_MR.T, alpha=-1, out=matrix.lying_in(lost_N))
        feedback.own.lose(lost_N, place)

    @torch.no_grad()
    def finish(self, group: dist.ProcessGroup, wait: Callable[[dist.Work], object]) -> None:
        """Waits for all that was started; what arrives of the sums lies in the tensors after it."""
        self.turn(group, wait)
        for flat_N, place, first_n, second_n, work in self._turned:
            assert second_n is not None
            if work is not None:
                wait(work)
            factors, before_n = self._factors[place], self._directions[place]
            after_n = torch.empty_like(before_n)
            for matrix, left_NR, right_MR, before_MR, after_MR in zip(
                factors.matrices, factors.left(first_n), *map(factors.right, (second_n, before_n, after_n)), strict=True
            ):
                torch.mm(left_NR, right_MR.T, out=matrix.lying_in(flat_N))
                after_MR.copy_(directions(right_MR, before_MR))
            for there, here in factors.rest(first_n, flat_N):
                here.copy_(there)
            self._after[place] = after_n
        self._turned.clear()

    def forget(self) -> None:
        """What was started does not end any more."""
        self._sent.clear()
        self._turned.clear()

    def settle(self, applied: bool) -> None:
        """Whether what was summed since the last call has been applied; if not, all is as before."""
        if applied:
            self._directions |= self._after
        self._after.clear()
        if self.feedback is not None:
            self.feedback.settle(applied)

    def common(self, replica: Replica) -> list[Shard]:
        """The directions, the same on all replicas: `lowrank-q.<parameter>`, of the shape of its rows with `rank` in
        place of their number. Where this rank's rows begin further down, `@<row>` stands after the slot, and then
        `-<number>` for another part of the gradient of the same piece, as with residuals."""
        named = []
        for place, factors in self._factors.items():
            known = [*zip(factors.matrices, factors.right(self._directions[place]), strict=True)]
            # Columns of a saved tensor must all be there: of those that go as they are, something.
            known += [(m, first_directions(m, self._how, self._directions[place])) for m in factors.small]
            named += [_named(matrix, known_MR, replica.mesh.replica == 0) for matrix, known_MR in known]
        return named

    def state(self, replica: Replica) -> list[Shard]:
        """What it needs to go on: directions, and residuals."""
        return self.common(replica) + ([] if self.feedback is None else self.feedback.state(replica))

    def wanted(self, replica: Replica, saved: Mapping[str, Saved]) -> Iterator[Shard]:
        """Of a checkpoint with these tensors, what is to be filled: each shard before the next is asked for.

        Where rows were cut otherwise, directions are those of the rows that this rank's begin among; with another
        rank, or none in the checkpoint, the first ones.
        """
        found = _found(saved)
        for shard in self.common(replica):
            name = _nearest(shard.name, found)
            if name and saved[name].shape == shard.global_shape:
                yield replace(shard, name=name)
        if self.feedback is not None:
            yield from self.feedback.wanted(replica, saved, {})


def orthonormal(left_NR: Tensor) -> Tensor:
    """Columns of length 1 that are orthogonal to each other and span all that those given do; N ≥ R. Those that the
    others span already are replaced by any. Not finite where not all that is given is."""
    return torch.where(left_NR.isfinite().all(), torch.linalg.qr(left_NR)[0], torch.nan)


def directions(right_MR: Tensor, before_MR: Tensor) -> Tensor:
    """The columns, each of length 1; of one that is zero, as where there was no gradient, that from before: in the
    direction of nothing, nothing would be found again."""
    length_R = torch.linalg.vector_norm(right_MR, dim=0)
    return torch.where((length_R > 0) & length_R.isfinite(), right_MR / length_R, before_MR)


def first_directions(matrix: Matrix, how: LowRank, like: Tensor) -> Tensor:
    """(columns, rank) normal numbers by seed, parameter and column. like: of their kind."""
    local = like.new_empty(matrix.columns, how.rank)
    shard = _named(matrix, local, owner=False)
    initialise_(shard.local, f"lowrank-q.{matrix.shard.name}", shard.global_shape, shard.offsets, _NORMAL, how.seed)
    return local


def _named(matrix: Matrix, known_MR: Tensor, owner: bool) -> Shard:
    """Its directions as a piece of a tensor."""
    piece, rank = matrix.shard, known_MR.shape[1]
    row, copy = piece.offsets[0], matrix.copy
    slot = "lowrank-q" + f"@{row}" * (row > 0) + f"-{copy}" * (copy > 0)
    local = known_MR.view(*piece.local.shape[1:], rank)
    shape, offsets = (*piece.global_shape[1:], rank), (*piece.offsets[1:], 0)
    return Shard(f"{slot}.{piece.name}", shape, offsets, local, owner=owner)


def _all_reduce(numbers_n: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """None where there is nothing to sum, as on the other replicas."""
    return dist.all_reduce(numbers_n, group=group, async_op=True) if len(numbers_n) else None


def _found(names: Iterable[str]) -> dict[str, list[tuple[int, int, str]]]:
    """Parameter -> the directions of it among these names: (first row, copy, name)."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        if match := _SLOT.fullmatch(name):
            row, copy, parameter = match.groups()
            found.setdefault(parameter, []).append((int(row or 0), int(copy or 0), name))
    return found


def _nearest(name: str, found: dict[str, list[tuple[int, int, str]]]) -> str | None:
    """Of those found of the same parameter, the directions of the rows among which these begin; None if there are
    none."""
    ((parameter, ((row, copy, _),)),) = _found([name]).items()
    above = [one for one in found.get(parameter, ()) if one[0] <= row]
    # Of the last rows that begin no later; of their copies this one, else the first.
    return min(above, key=lambda one: (-one[0], one[1] != copy, one[1]))[2] if above else None
