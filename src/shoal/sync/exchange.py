"""What replicas that train apart send each other: pseudo-gradients of fragments on their way, and their outer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.job import shares
from shoal.job.sync import SyncOptions
from shoal.mesh import Mesh
from shoal.parallel.flat import Flat
from shoal.shard import Shard
from shoal.sync.codec import Codec
from shoal.sync.codec.plain import Plain
from shoal.sync.encoded import EncodedSum
from shoal.sync.feedback import Stretch
from shoal.sync.fragment import Fragment
from shoal.sync.rounds import fragment_of
from shoal.sync.step import Outer
from shoal.sync.waits import Waits


@dataclass
class _Travelling:
    """moved_N: a fragment's pseudo-gradient, and once that is here the mean of all. squares: of this rank's own."""

    moved_N: Tensor
    squares: Tensor
    here: bool = False


class Lost(NamedTuple):
    """What a codec has lost of a fragment's shards, in their order: of this replica's own numbers, and of sums."""

    shards: list[Shard]
    own_N: Tensor
    sums_N: Tensor


class Exchange:
    """The fragments of one rank, each with what is on its way of it.

    Sums over replicas are made number by number in the order of ranks, so the common weights are equal to the last bit
    on all of them, and without a codec do not depend on how many numbers travel together.
    """

    def __init__(self, mesh: Mesh, options: SyncOptions, codec: Codec | None, learned: list[Shard], fixed: list[Shard]):
        """learned, fixed: as for `Fragment`. codec: how pseudo-gradients are written, None = as they are."""
        self.mesh, self.options = mesh, options
        self.waits = Waits(mesh)

        def of(index: int, shards: list[Shard]) -> list[Shard]:
            return [shard for shard in shards if fragment_of(shard.name, options.fragments) == index]

        self.fragments = [Fragment(of(i, learned), of(i, fixed), mesh.device) for i in range(options.fragments)]
        self.travelling: dict[int, _Travelling] = {}
        alone = mesh.layout.replicas == 1
        feedback = codec is not None and options.feedback and not alone
        self._sums = [EncodedSum(codec or Plain(), feedback) for _ in self.fragments]
        # What travels together of each fragment.
        self._places = [[] if alone else self._split(fragment.common_N) for fragment in self.fragments]
        # What this replica counts in a mean; 1 where all learn from equally many sequences.
        self._counts = shares.weights(mesh.layout, options)[mesh.replica]
        # Loss and weight of this rank's batches since the last outer step.
        self.round = torch.zeros(2, dtype=torch.float64, device=mesh.device)

    def _split(self, flat_N: Tensor) -> list[Flat]:
        bucket = max(1, int(self.options.bucket_mib * 2**20) // flat_N.element_size())
        return [Flat.of_numbers(len(piece)) for piece in flat_N.split(bucket)] if len(flat_N) else []

    def leave(self, index: int) -> None:
        """Sends a fragment's pseudo-gradient to the other replicas; by all ranks in the same order."""
        moved_N = self.fragments[index].moved()
        self.travelling[index] = _Travelling(moved_N, self.fragments[index].squares(moved_N))
        self._weigh(moved_N)
        places = self._places[index]
        for piece_N, place in (
            zip(moved_N.split([place.size for place in places]), places, strict=True) if places else ()
        ):
            self._sums[index].start(piece_N, self.mesh.across_replicas, place)

    def _weigh(self, moved_N: Tensor) -> None:
        if self._counts != 1:
            moved_N.mul_(self._counts)

    def turn(self, index: int) -> None:
        """Waits until what all replicas have sent has reached whoever adds it up, and sends the sums back."""
        sent = self.travelling[index]
        if not sent.here and self._places[index]:
            self._sums[index].turn(self.mesh.across_replicas, self.waits.wait)

    def finish(self, index: int) -> None:
        """Waits until the mean of all replicas is here."""
        sent = self.travelling[index]
        if not sent.here:
            if self._places[index]:
                self._sums[index].finish(self.mesh.across_replicas, self.waits.wait)
            sent.moved_N.div_(self.mesh.layout.replicas)
            sent.here = True

    def arrive(self, due: list[int], stop: bool) -> tuple[Outer | None, bool, bool]:
        """The outer step of these fragments: (what it was, whether some rank asked to stop, whether all was finite).

        Where a mean is not finite, all replicas go back to the weights that they had in common.
        """
        for index in due:
            self.finish(index)
        outer, asked, finite = self._agree(due, stop)
        for index in due:
            if finite:
                mean_N = self.travelling[index].moved_N
                self.fragments[index].step(mean_N, self.options.outer_lr, self.options.momentum)
            self.fragments[index].mix(self.options.mix if finite else 0.0)
            self._sums[index].settle(finite)
            del self.travelling[index]
        return outer, asked, finite

    def average(self, due: list[int], stop: bool) -> tuple[Outer | None, bool, bool]:
        """As `arrive`, but replicas take the mean of their weights as they are, in full precision, and of what a codec
        has lost before. What was on its way is forgotten."""
        for index in due:
            if index in self.travelling:
                self.finish(index)
                self._sums[index].settle(applied=False)
            moved_N = self.fragments[index].moved()
            self.travelling[index] = _Travelling(moved_N, self.fragments[index].squares(moved_N), here=True)
            self._weigh(moved_N)
            self._take_back(index, moved_N)
            if self._places[index]:
                summing = EncodedSum(Plain())
                for piece_N in moved_N.split([place.size for place in self._places[index]]):
                    summing.start(piece_N, self.mesh.across_replicas)
                summing.finish(self.mesh.across_replicas, self.waits.wait)
            moved_N.div_(self.mesh.layout.replicas)
        outer, asked, finite = self._agree(due, stop)
        for index in due:
            if finite:
                self.fragments[index].step(self.travelling[index].moved_N, 1.0, 0.0)
            self.fragments[index].mix(0.0)
            del self.travelling[index]
        return outer, asked, finite

    def _take_back(self, index: int, moved_N: Tensor) -> None:
        """Adds what a codec has lost to this replica's pseudo-gradient, of its own numbers and of sums it owned."""
        feedback, first = self._sums[index].feedback, 0
        if feedback is None:
            return
        feedback.keep_sums()
        for place in self._places[index]:
            if (kept := feedback.own.kept.pop(place, None)) is not None:
                moved_N[first : first + place.size] += kept.numbers_N
            first += place.size

    def _agree(self, due: list[int], stop: bool) -> tuple[Outer | None, bool, bool]:
        """One small sum over all ranks, once the means are here."""
        if not due:
            return None, False, True
        sent = [self.travelling[index] for index in due]
        means = [self.fragments[index].squares(one.moved_N) for index, one in zip(due, sent, strict=True)]
        squares = torch.stack([torch.stack([one.squares for one in sent]).sum(), torch.stack(means).sum()])
        squares /= self.mesh.layout.replicas
        broken = not all(bool(one.moved_N.isfinite().all()) for one in sent)
        flags = torch.tensor([stop, broken], dtype=torch.float64, device=self.mesh.device)
        totals = torch.cat([self.round, flags, squares, self.waits.own()])
        work = dist.all_reduce(totals, group=self.mesh.everyone, async_op=True)
        assert work is not None
        self.waits.wait(work)
        self.round.zero_()
        loss_sum, tokens, asked, not_finite, drift, common, *waits = totals.tolist()
        self.waits.hear(waits)
        outer = Outer(loss_sum / tokens if tokens else float("nan"), tokens, drift**0.5, common**0.5)
        return outer, asked > 0, not not_finite

    def expect(self, index: int) -> None:
        """A mean that was here when the run was saved: it is filled in by whoever loads."""
        moved_N = torch.zeros_like(self.fragments[index].common_N)
        self.travelling[index] = _Travelling(moved_N, self.fragments[index].squares(moved_N), here=True)

    def figures(self) -> Tensor:
        """This rank's part of what the next outer steps will tell: loss, weight, and squares of what travels."""
        return torch.cat([self.round, *(self.travelling[index].squares[None] for index in sorted(self.travelling))])

    def count(self, figures: list[float]) -> None:
        """All ranks' `figures`, as this one's."""
        self.round.copy_(torch.tensor(figures[:2], dtype=torch.float64))
        for index, squares in zip(sorted(self.travelling), figures[2:], strict=False):
            self.travelling[index].squares.fill_(squares)

    def unsent(self) -> list[Lost]:
        """Of each fragment what a codec has lost: of this replica's own numbers, and of the sums; the latter to be
        called on all ranks. None where nothing is kept."""
        return [self._lost(index) for index, one in enumerate(self._sums) if one.feedback is not None]

    def _lost(self, index: int) -> Lost:
        fragment, feedback, first = self.fragments[index], self._sums[index].feedback, 0
        assert feedback is not None
        own_N, sums_N = torch.zeros_like(fragment.common_N), torch.zeros_like(fragment.common_N)
        sent = self.travelling.get(index)
        # What is on its way will count where it is finite, as all ranks see in the same numbers.
        counts = sent is not None and bool(sent.moved_N.isfinite().all())
        for place in self._places[index]:
            for residuals, flat_N in ((feedback.own, own_N), (feedback.sums, sums_N)):
                if (kept := residuals.newest(place) if counts else residuals.kept.get(place)) is not None:
                    start = first + kept.first
                    flat_N[start : start + len(kept.numbers_N)] = kept.numbers_N
            first += place.size
        if self._places[index]:
            self.mesh.wait(dist.all_reduce(sums_N, group=self.mesh.across_replicas, async_op=True))
        return Lost(fragment.shards, own_N, sums_N)

    def lose(self, losses: list[Lost], replicas: int) -> None:
        """As `unsent` told it of all fragments, when there were so many replicas: among which the sum was divided."""
        for index, lost in enumerate(losses):
            for flat_N in lost[1:]:
                flat_N.mul_(self.mesh.layout.replicas / replicas)
            feedback, first = self._sums[index].feedback, 0
            assert feedback is not None
            for place in self._places[index]:
                own_N, sums_N = (flat_N[first : first + place.size] for flat_N in lost[1:])
                feedback.own.kept[place] = Stretch(0, own_N)
                start, stop = self._sums[index].owned_part(place.size, self.mesh.across_replicas)
                feedback.sums.kept[place] = Stretch(start, sums_N[start:stop])
                first += place.size

    def forget(self) -> None:
        """What was sent does not arrive any more."""
        self.travelling.clear()
        for one in self._sums:
            one.forget()
