"""Some of the numbers, all others 0. What is kept goes through another codec."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.ops.counter import hashes
from shoal.sync.codec.bits import read_as
from shoal.sync.codec.blocks import widened
from shoal.sync.codec.draws import Draws
from shoal.sync.codec.protocol import Codec, SizedCodec, check_length, numbers_in

# Numbers whose largest are looked for together, as in `blocks`.
_TOGETHER = 1 << 19


class TopK:
    """Of every chunk the k numbers that are largest by magnitude, and where they lie.

    ‖x − C(x)‖² ≤ (1 − k/n) ‖x‖² for a chunk of n (Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory",
    section 2); through a codec with δ of its own, ≤ (1 − δ k/n) ‖x‖². A chunk has 256 numbers and a place in it takes
    one byte, or where less than one in 256 is kept 4,096 and two bytes. Chunks in place of whole rows: as in Peng,
    Quesnelle & Kingma 2024, "DeMo", and with two bits for each that is kept in Sarfi et al. 2025, "Communication
    Efficient LLM Pre-training with SparseLoCo".

    Magnitudes are compared in float32; of equal ones the first. From the largest to the smallest within a chunk, so
    that neighbours in a block of the other codec are of one size.
    """

    def __init__(self, share: float, values: SizedCodec):
        """share: of the numbers, how many are kept, to the nearest whole k. values: how they are written."""
        self.values = values
        self.granule = 256 if share >= 1 / 256 else 4096
        self.kept = max(1, round(share * self.granule))
        self._place = torch.uint8 if self.granule == 256 else torch.int16

    def row_bytes(self, numbers: int) -> int:
        kept = numbers // self.granule * self.kept
        return kept * self._place.itemsize + _rows_bytes(self.values, kept)

    def encode(self, values_RN: Tensor) -> Tensor:
        check_length(self, values_RN)
        chunks_FN = values_RN.reshape(-1, self.granule)
        place_FK = torch.cat([largest(some, self.kept) for some in chunks_FN.split(_TOGETHER // self.granule)])
        kept_RK = widened(chunks_FN.gather(1, place_FK).view(len(values_RN), -1))
        place_RK = place_FK.to(self._place).view(len(values_RN), -1)
        return torch.cat([place_RK.view(torch.uint8), _write(self.values, kept_RK)], 1)

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        chunks = numbers_in(self, payload_RB.shape[1]) // self.granule
        kept = chunks * self.kept
        place_RB, written_RB = payload_RB.tensor_split([kept * self._place.itemsize], 1)
        place_RK = read_as(place_RB, self._place).long()
        values_RCN = torch.zeros(len(payload_RB), chunks, self.granule, dtype=dtype, device=payload_RB.device)
        kept_RK = _read(self.values, written_RB, kept, dtype)
        values_RCN.scatter_(2, *(t.view(len(payload_RB), chunks, self.kept) for t in (place_RK, kept_RK)))
        return values_RCN.flatten(1)


class RandomK:
    """One number of every stretch of S = 1 / share, drawn at random; where, both sides derive from the row's key.

    A row is the key of 8 bytes, a hash of seed, rank, call and row, and what is kept. E‖x − C(x)‖² = (1 − 1/S) ‖x‖²
    over the draw, as of any k = n/S out of n (Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory", section
    2); by stretches they take no sorting. `unbiased`: what is kept comes back S times as large, so that E C(x) = x
    and E‖C(x) − x‖² = (S − 1) ‖x‖². That is no contraction: not for error feedback, and large numbers may overflow.
    """

    def __init__(self, share: float, values: SizedCodec, draws: Draws, unbiased: bool = False):
        """share: S = 1 / share to the nearest whole number. values: how what is kept is written."""
        self.values, self.draws, self.unbiased = values, draws, unbiased
        self.stretch = round(1 / share)
        # So that what is kept needs no filling up, and a row's bytes tell its length.
        self.granule = self.stretch * values.granule

    def row_bytes(self, numbers: int) -> int:
        return 8 + self.values.row_bytes(numbers // self.stretch)

    def encode(self, values_RN: Tensor) -> Tensor:
        check_length(self, values_RN)
        key_R = self.draws.keys(len(values_RN), values_RN.device)
        kept_RK = widened(values_RN.gather(1, self._places(key_R, values_RN.shape[1])))
        # A row that is not finite must be seen as such wherever in it that is.
        largest_R1 = torch.maximum(values_RN.amax(1, keepdim=True), -values_RN.amin(1, keepdim=True))
        kept_RK = torch.where(largest_R1.isfinite(), kept_RK, torch.nan)
        return torch.cat([key_R[:, None].view(torch.uint8), _write(self.values, kept_RK)], 1)

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = numbers_in(self, payload_RB.shape[1])
        key_R = read_as(payload_RB[:, :8], torch.int64)[:, 0]
        kept_RK = _read(self.values, payload_RB[:, 8:], numbers // self.stretch, dtype)
        if self.unbiased:
            kept_RK = kept_RK * self.stretch
        values_RN = torch.zeros(len(payload_RB), numbers, dtype=dtype, device=payload_RB.device)
        return values_RN.scatter_(1, self._places(key_R, numbers), kept_RK)

    def _places(self, key_R: Tensor, numbers: int) -> Tensor:
        """(R, K): where in its row each number lies that is kept."""
        first_K = torch.arange(0, numbers, self.stretch, device=key_R.device)
        drawn_RK = hashes(key_R, 0, len(first_K)).long() + (1 << 31)
        return first_K + (drawn_RK * self.stretch >> 32)


def largest(values_FN: Tensor, many: int) -> Tensor:
    """Where in each row the largest by magnitude lie, in this order, of equal ones the first first; N ≤ 65,536.

    What is not finite is larger than all that is. `topk` of the magnitudes alone promises nothing about equal ones.
    """
    magnitude_FN = values_FN.float().contiguous().view(torch.int32) & 0x7FFFFFFF
    after_N = torch.arange(values_FN.shape[1] - 1, -1, -1, device=values_FN.device)
    return magnitude_FN.long().mul_(1 << 16).add_(after_N).topk(many).indices


def _rows_bytes(codec: SizedCodec, kept: int) -> int:
    return codec.row_bytes(kept + -kept % codec.granule)


def _write(codec: Codec, kept_RK: Tensor) -> Tensor:
    """What is not finite is written as NaN, which stays one whatever is done to it."""
    finite_RK = torch.where(kept_RK.isfinite(), kept_RK, torch.nan)
    over = kept_RK.shape[1] % codec.granule
    if over:
        # The last block is filled up with its own numbers again, as often as all of them fit, and with their mean
        # magnitude: the block's mean and its largest stay what they were, and with them what the codec's paper says
        # of its error. (With zeros the mean would be less; with some numbers more often than others it may be double.)
        last_RK = finite_RK[:, -over:]
        mean_R1 = (last_RK.abs() / over).sum(1, keepdim=True)
        again = codec.granule // over
        fill = [last_RK.repeat(1, again - 1), mean_R1.expand(-1, codec.granule - again * over)]
        finite_RK = torch.cat([finite_RK, *fill], 1)
    return codec.encode(finite_RK)


def _read(codec: Codec, written_RB: Tensor, kept: int, dtype: torch.dtype) -> Tensor:
    return codec.decode(written_RB, dtype)[:, :kept]
