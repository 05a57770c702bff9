"""Batches of packed tokens, as a pure function of the position in the data."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.batch import Batch
from shoal.data.order import permute
from shoal.data.prepared import Prepared
from shoal.errors import DataError
from shoal.job.data import DataOptions


class Loader:
    """Reads a split of a prepared corpus.

    The data's position is one integer, the number of global samples before it. It has the same sample
    wherever a run was stopped and however many ranks read; epoch e is positions e·samples … (e + 1)·samples −
    1, and a global batch may reach from one into the next. samples: rows an epoch. tokens: predictions an
    epoch (weights that are 1).
    """

    def __init__(
        self,
        prepared: Prepared,
        options: DataOptions,
        split: str = "train",
        global_batch: int = 1,
        seed: int = 0,
    ):
        """Raises DataError if the split holds nothing, or training less than one sequence."""
        if prepared.counts(split).predictions == 0:
            fix = "give more text, or another data.validation"
            raise DataError(f"there is no {split} text", where=str(prepared.folder), fix=fix)
        plan = prepared.plan(split, options.sequence_length, options.pack)
        self._start_P, self._length_P, self._first_R = plan.start_P, plan.length_P, plan.first_R
        self._stored = prepared.store(split).tokens
        self._length, self._end = options.sequence_length, prepared.end_token
        self._random, self._seed = options.order == "random", seed
        self.global_batch = global_batch
        self.samples, self.tokens = plan.rows, plan.predictions

    def batch(self, position: int, part: int, parts: int) -> Batch:
        """Part `part` of `parts` equal parts of the global batch that starts at global sample `position`."""
        assert self.global_batch % parts == 0, f"{self.global_batch} samples in {parts} parts"
        size = self.global_batch // parts
        return self.stretch(position + part * size, size)

    def stretch(self, position: int, count: int) -> Batch:
        """So many global samples, from `position` on."""
        return self.rows(self.order(position + np.arange(count)))

    def order(self, position_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row at each global sample position, 0 ≤ row < samples."""
        epoch_N, row_N = np.divmod(position_N, self.samples)
        if self._random:
            for epoch in np.unique(epoch_N).tolist():
                here = epoch_N == epoch
                row_N[here] = permute(row_N[here], self.samples, self._seed, epoch)
        return row_N

    def rows(self, row_B: NDArray[np.int64]) -> Batch:
        """The batch of these rows."""
        B, L = len(row_B), self._length
        row_B = np.array(row_B, np.int64)
        # One more piece fills up each row, so that the pieces cover the batch without a gap: one running
        # index gathers all of it. The filler reads from the store's start, and is overwritten.
        first_B, count_B = self._first_R[row_B], self._first_R[row_B + 1] - self._first_R[row_B]
        filler_B = np.cumsum(count_B + 1) - 1
        number_P = np.arange(filler_B[-1] + 1) - np.repeat(filler_B - count_B, count_B + 1)
        piece_P = np.repeat(first_B, count_B + 1) + number_P
        piece_P[filler_B] = 0
        start_P, length_P = self._start_P[piece_P], self._length_P[piece_P].astype(np.int64)
        start_P[filler_B] = length_P[filler_B] = 0
        length_P[filler_B] = L - np.add.reduceat(length_P, filler_B - count_B)
        begin_P = np.cumsum(length_P) - length_P
        weight_P = np.ones(len(length_P), np.float32)
        weight_P[filler_B] = 0
        place_N = np.arange(B * L)
        source_N = place_N + np.repeat(start_P - begin_P, length_P)
        weight_N = np.repeat(weight_P, length_P)
        tokens_N = self._stored.take(source_N, mode="clip").astype(np.int64)
        labels_N = self._stored.take(source_N + 1, mode="clip").astype(np.int64)
        filled = np.flatnonzero(weight_N == 0)
        tokens_N[filled], labels_N[filled] = self._end, 0
        document_N = np.repeat(number_P.astype(np.int32), length_P)
        position_N = place_N.astype(np.int32) - np.repeat(begin_P.astype(np.int32), length_P)

        return Batch(
            tokens_BL=torch.from_numpy(tokens_N.reshape(B, L)),
            labels_BL=torch.from_numpy(labels_N.reshape(B, L)),
            document_BL=torch.from_numpy(document_N.reshape(B, L)),
            position_BL=torch.from_numpy(position_N.reshape(B, L)),
            sample_B=torch.from_numpy(row_B),
            weight_BL=torch.from_numpy(weight_N.reshape(B, L)),
        )
