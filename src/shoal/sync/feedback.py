"""Error feedback: what a codec lost of what was sent is added to what is sent next.

With gradient g and residual e, a replica sends C(g + e) and keeps e ← g + e − C(g + e) (Seide et al. 2014, "1-Bit
Stochastic Gradient Descent", section 3; that it converges as SGD does: Stich et al. 2018, "Sparsified SGD with
Memory", and Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 1). The owner of a chunk does the same
with the sum that it encodes for all (Tang et al. 2019, "DoubleSqueeze", algorithm 1; Tang et al. 2021, "1-bit Adam",
algorithm 1). So what was applied and what is kept are together all gradients there have been.

Residuals are sums over tokens, as gradients are. The papers' e has the unit of an update, and a step's update is a sum
divided by its number of tokens: what is lost in a step of w tokens and sent in one of w′ is divided by w′, not by w.
That is meant: a token's gradient weighs as much as those of the step with which it arrives (whose w′ nobody knows yet
when its first bucket leaves). Learning rate and clipping come after the sum and do not enter a residual; what clipping
takes away is not lost but unwanted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.parallel.flat import Flat
from shoal.parallel.pieces import Piece
from shoal.parallel.replica import Replica
from shoal.shard import Shard
from shoal.sync.codec import Codec

_SLOT = re.compile(r"residual(?:@(\d+)|-sum)(?:-(\d+))?\.(.+)", re.DOTALL)


class Stretch(NamedTuple):
    """Numbers of a flat tensor from place `first` on."""

    first: int
    numbers_N: Tensor


class Residuals:
    """What a codec lost at one end of the way, of each flat tensor. Steps that are not applied leave no trace."""

    def __init__(self) -> None:
        self.kept: dict[Flat, Stretch] = {}
        self._after: dict[Flat, Stretch] = {}

    def encode(self, codec: Codec, values_RN: Tensor, place: Flat, first: int = 0) -> Tensor:
        """The payload of `values` and of what was lost before, which is added to them in place.

        values: rows of a flat tensor, one behind the other, from `first` on; they may reach beyond its end.
        """
        self.add_to(values_RN.view(-1), place)
        payload_RB = codec.encode(values_RN)
        lost_N = (values_RN - codec.decode(payload_RB, values_RN.dtype)).view(-1)[: max(0, place.size - first)]
        self.lose(lost_N, place, first)
        return payload_RB

    def add_to(self, values_N: Tensor, place: Flat) -> None:
        """Adds what was lost of this tensor before."""
        if (kept := self.kept.get(place)) is not None:
            values_N[: len(kept.numbers_N)] += kept.numbers_N

    def lose(self, lost_N: Tensor, place: Flat, first: int = 0) -> None:
        """What is lost of this tensor now, from `first` on."""
        # What is between parameters belongs to none, and would not be in a checkpoint.
        self._after[place] = Stretch(first, place.clear_gaps(lost_N, first))

    def newest(self, place: Flat) -> Stretch | None:
        """What was lost of this tensor, also where it is not known yet whether that counts."""
        return self._after.get(place, self.kept.get(place))

    def settle(self, applied: bool) -> None:
        """What was lost since the last call counts from now on, or never has been: one number that is not finite would
        be in all later steps."""
        if applied:
            self.kept |= self._after
        self._after.clear()


class Feedback:
    """The residuals of a rank, in the gradient's dtype: of its own gradient, and of the sums of the chunks it owns."""

    def __init__(self) -> None:
        self.own, self.sums = Residuals(), Residuals()

    def settle(self, applied: bool) -> None:
        self.own.settle(applied)
        self.sums.settle(applied)

    def keep_sums(self) -> None:
        """When chunks get other owners: what was lost of sums goes along with this rank's own gradient. Together they
        are as much as before."""
        for place, (first, numbers_N) in self.sums.kept.items():
            self.own.kept[place].numbers_N[first : first + len(numbers_N)] += numbers_N
        self.sums.kept.clear()

    def state(self, replica: Replica) -> list[Shard]:
        """`residual@<replica>.<parameter>` of each replica, and one `residual-sum.<parameter>`. Where several ranks of
        a replica have a part of one sum each, another `-<number>` stands after that for all but the first."""
        return [named for _, _, named in self._pieces(replica)]

    def _pieces(self, replica: Replica) -> Iterator[tuple[Residuals, Piece, Shard]]:
        for residuals, slot in ((self.own, f"residual@{replica.mesh.replica}"), (self.sums, "residual-sum")):
            for place in replica.flats():
                if place not in residuals.kept:
                    continue
                first, numbers_N = residuals.kept[place]
                for piece, shard in replica.lying_in(place, numbers_N, first):
                    copy = f"-{piece.cut.copy}" if piece.cut.copy else ""
                    yield residuals, piece, replace(shard, name=f"{slot}{copy}.{shard.name}")

    def wanted(self, replica: Replica, saved: Collection[str], chunks: Mapping[Flat, Stretch]) -> Iterator[Shard]:
        """Of a checkpoint with tensors of these names, what is to be filled: each shard before the next is asked for.

        With however many replicas, the sum of all residuals stays what it was: that of replica r goes to r modulo their
        number. Without any in the checkpoint they begin at zero. chunks: of each flat tensor, zeros for the chunk that
        this rank owns; empty where nobody owns any, and the first replica gets what was lost of sums.
        """
        found = _found(saved)
        if not found:
            return
        self.sums.kept = dict(chunks)
        self.own.kept = {place: Stretch(0, place.zeros(place.size)) for place in replica.flats()}
        mesh = replica.mesh
        for residuals, piece, shard in self._pieces(replica):
            names = []
            for name, whose, copy in found.get(piece.shard.name, ()):
                if whose is None:
                    to = residuals is self.sums if chunks else mesh.replica == 0
                else:
                    to = residuals is self.own and whose % mesh.layout.replicas == mesh.replica
                if to and copy % piece.cut.copies == piece.cut.copy:
                    names.append(name)
            yield from added_up(shard, names)


class Owed:
    """Residuals of a checkpoint in a run without feedback: all of them are added to the first gradient that is applied,
    once that has been summed."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []

    def wanted(self, replica: Replica, saved: Collection[str]) -> Iterator[Shard]:
        """As `Feedback.wanted`."""
        found = _found(saved)
        self.shards = [replace(s, local=torch.zeros_like(s.local)) for s in replica.shards() if s.name in found]
        for shard in self.shards:
            yield from added_up(shard, [name for name, _, _ in found[shard.name]])

    def add_to(self, shards: list[Shard]) -> None:
        """shards: those of the replica, with their gradients."""
        places = {(shard.name, shard.offsets): shard.local for shard in self.shards}
        for shard in shards if places else ():
            owed = places.get((shard.name, shard.offsets))
            if owed is not None and shard.grad is not None:
                shard.grad += owed

    def settle(self, applied: bool) -> None:
        if applied:
            self.shards = []

    def state(self) -> list[Shard]:
        """What is still owed, before the first step."""
        return [replace(shard, name=f"residual-sum.{shard.name}") for shard in self.shards]


def added_up(shard: Shard, names: Sequence[str]) -> Iterator[Shard]:
    """The tensors of these names one after the other, to be filled; their sum is then in the shard."""
    for number, name in enumerate(names):
        part = replace(shard, name=name, local=torch.empty_like(shard.local) if number else shard.local)
        yield part
        if number:
            shard.local += part.local


def _found(names: Iterable[str]) -> dict[str, list[tuple[str, int | None, int]]]:
    """Parameter -> the residuals of it among these names: (name, replica or None for that of sums, copy), in order."""
    found: dict[str, list[tuple[str, int | None, int]]] = {}
    for name in names:
        if match := _SLOT.fullmatch(name):
            whose, copy, parameter = match.groups()
            found.setdefault(parameter, []).append((name, int(whose) if whose else None, int(copy or 0)))
    return {parameter: sorted(of, key=lambda o: (o[1] or 0, o[2])) for parameter, of in found.items()}
