"""Sums over ranks of tensors that travel encoded, each number encoded once per hop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.parallel.collectives import ALL_GATHER
from shoal.parallel.flat import Flat
from shoal.parallel.replica import Replica
from shoal.shard import Shard
from shoal.sync.codec import Codec
from shoal.sync.feedback import Feedback, Stretch


class _Sent(NamedTuple):
    """A tensor whose chunks are on their way to their owners. rows_WB: where those of this rank's chunk arrive."""

    flat_N: Tensor
    place: Flat | None
    payload_WB: Tensor
    rows_WB: Tensor
    work: dist.Work | None


class _Turned(NamedTuple):
    """A tensor whose sums are on their way to all. own_1B: this rank's chunk, sent until then."""

    flat_N: Tensor
    payload_WB: Tensor
    own_1B: Tensor
    work: dist.Work | None


class EncodedSum:
    """Every rank owns one chunk of each tensor. It gets what all ranks have encoded of it, adds up in their order and
    in the tensor's own dtype, encodes the sum and sends it to all. Everybody decodes the same bytes, the owner too,
    so replicas stay equal to the last bit.

    Source: the compressed all-reduce (gather, sum, scatter of chunks) of Tang et al. 2021, "1-bit Adam".
    """

    def __init__(self, codec: Codec, feedback: bool = False):
        """feedback: whether what the codec loses of a tensor is added to the one that next lies in the same place."""
        self.codec = codec
        self.feedback = Feedback() if feedback else None
        self._sent: list[_Sent] = []
        self._turned: list[_Turned] = []

    def start(self, flat_N: Tensor, group: dist.ProcessGroup, place: Flat | None = None) -> None:
        """The first hop. To be called with the same tensors in the same order on all ranks; they change in `finish`.

        place: of each tensor its own, the same every time; needed for feedback.
        """
        ranks = group.size()
        values_WC = flat_N.new_zeros(ranks, self._chunk(flat_N.numel(), ranks))
        values_WC.view(-1)[: flat_N.numel()] = flat_N
        if self.feedback is None:
            payload_WB = self.codec.encode(values_WC)
        else:
            assert place is not None, "feedback needs to know which tensor this is"
            assert flat_N.numel() == place.size, f"{flat_N.numel()} numbers came where {place.size} lie"
            payload_WB = self.feedback.own.encode(self.codec, values_WC, place)
        rows_WB = torch.empty_like(payload_WB)
        work = dist.all_to_all_single(rows_WB, payload_WB, group=group, async_op=True)
        self._sent.append(_Sent(flat_N, place, payload_WB, rows_WB, work))

    def turn(self, group: dist.ProcessGroup, wait: Callable[[dist.Work], object]) -> None:
        """Waits for the first hop of all that was started, and begins the second."""
        for sent in self._sent:
            assert sent.work is not None
            wait(sent.work)
            decoded_WC = self.codec.decode(sent.rows_WB, sent.flat_N.dtype)
            total_C = decoded_WC[0]
            for row_C in decoded_WC[1:]:
                total_C += row_C
            if self.feedback is None:
                own_1B = self.codec.encode(total_C[None])
            else:
                assert sent.place is not None
                first = group.rank() * len(total_C)
                own_1B = self.feedback.sums.encode(self.codec, total_C[None], sent.place, first)
            # The memory of the first hop is large enough for the second.
            work = ALL_GATHER(sent.payload_WB, own_1B, group=group, async_op=True)
            self._turned.append(_Turned(sent.flat_N, sent.payload_WB, own_1B, work))
        self._sent.clear()

    def finish(self, group: dist.ProcessGroup, wait: Callable[[dist.Work], object]) -> None:
        """Waits for all that was started; the sums lie in the tensors after it."""
        self.turn(group, wait)
        for turned in self._turned:
            assert turned.work is not None
            wait(turned.work)
            decoded_WC = self.codec.decode(turned.payload_WB, turned.flat_N.dtype)
            turned.flat_N.copy_(decoded_WC.view(-1)[: turned.flat_N.numel()])
        self._turned.clear()

    def forget(self) -> None:
        """What was started does not end any more."""
        self._sent.clear()
        self._turned.clear()

    def settle(self, applied: bool) -> None:
        """Whether what was summed since the last call has been applied; if not, residuals are as before."""
        if self.feedback is not None:
            self.feedback.settle(applied)

    def common(self, replica: Replica) -> list[Shard]:
        """What of its state is the same on all replicas."""
        return []

    def state(self, replica: Replica) -> list[Shard]:
        """What it needs to go on: residuals."""
        return [] if self.feedback is None else self.feedback.state(replica)

    def wanted(self, replica: Replica, saved: Collection[str]) -> Iterator[Shard]:
        """Of a checkpoint with tensors of these names, what to fill: each shard before the next is asked for."""
        if self.feedback is not None:
            group = replica.mesh.across_replicas
            chunks = {place: self._owned(place, group) for place in replica.flats()}
            yield from self.feedback.wanted(replica, saved, chunks)

    def _owned(self, place: Flat, group: dist.ProcessGroup) -> Stretch:
        """Zeros for the part of such a tensor whose sum this rank encodes."""
        first, stop = self.owned_part(place.size, group)
        return Stretch(first, place.zeros(stop - first))

    def owned_part(self, numbers: int, group: dist.ProcessGroup) -> tuple[int, int]:
        """First number and last one + 1 of a tensor of so many whose sum this rank encodes."""
        chunk = self._chunk(numbers, group.size())
        first = min(group.rank() * chunk, numbers)
        return first, min(first + chunk, numbers)

    def _chunk(self, numbers: int, ranks: int) -> int:
        """Numbers of a rank's chunk."""
        return -(-numbers // (ranks * self.codec.granule)) * self.codec.granule
