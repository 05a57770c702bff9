"""The rows of one token store, by its packing plan: tokens gathered into a batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.batch import Batch
from shoal.data.pack import Plan


class Rows:
    """Rows `first` to `first` + `plan.rows` − 1 of a corpus, all there are unless it is a growing store.

    stored: the tokens that the plan cuts into pieces. length: tokens of a row. end: what fills up a row.
    """

    def __init__(self, stored: NDArray[np.integer], plan: Plan, length: int, end: int, first: int = 0):
        self._start_P, self._length_P, self._first_R = plan.start_P, plan.length_P, plan.first_R
        self._stored, self._length, self._end, self._first = stored, length, end, first

    def batch(self, row_B: NDArray[np.int64]) -> Batch:
        """The batch of these rows, by their numbers in the corpus; the array becomes part of it."""
        B, L = len(row_B), self._length
        here_B = row_B - self._first
        # One more piece fills up each row, so that the pieces cover the batch without a gap: one running
        # index gathers all of it. The filler reads from the store's start, and is overwritten.
        first_B, count_B = self._first_R[here_B], self._first_R[here_B + 1] - self._first_R[here_B]
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
