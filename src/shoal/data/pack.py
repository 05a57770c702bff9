"""Documents -> pieces -> rows: which tokens make up each sequence.

A document of n tokens gives n − 1 predictions. Cut into pieces of at most L predictions, piece k reads tokens
kL … and predicts kL + 1 …: pieces overlap by one token, so that every token but the first is predicted
exactly once. A piece attends only to itself and its positions start at 0, also when it goes on with a
document.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Plan:
    """start_P, length_P: first token (in the store) and predictions of each piece, those of a row side by
    side.

    first_R: the first piece of each row, and at the end the number of pieces. Rows are in the order of their
    first pieces in the store, and so are the pieces of a row.
    """

    start_P: NDArray[np.int64]
    length_P: NDArray[np.int32]
    first_R: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return len(self.first_R) - 1

    @property
    def predictions(self) -> int:
        return int(self.length_P.sum(dtype=np.int64))


def plan(start_D: NDArray[np.int64], length_D: NDArray[np.int32], capacity: int, pack: str) -> Plan:
    """Rows of `capacity` tokens, from documents at `start_D` of `length_D` tokens; `best_fit` or `pad`."""
    start_P, length_P = pieces(start_D, length_D, capacity)
    row_P = best_fit(length_P, capacity) if pack == "best_fit" else np.arange(len(length_P))
    # Rows are numbered by their first pieces.
    by_row = np.argsort(row_P, kind="stable")
    least_R = by_row[np.flatnonzero(np.diff(row_P[by_row], prepend=-1))]
    number_R = np.empty(len(least_R), np.int64)
    number_R[np.argsort(least_R)] = np.arange(len(least_R))
    row_P = number_R[row_P]
    by_row = np.argsort(row_P, kind="stable")
    first_R = np.searchsorted(row_P[by_row], np.arange(len(least_R) + 1))
    return Plan(start_P[by_row], length_P[by_row], first_R.astype(np.int64))


def pieces(
    start_D: NDArray[np.int64], length_D: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """(first token, predictions) of the pieces of documents, in order."""
    prediction_D = np.maximum(length_D.astype(np.int64) - 1, 0)
    count_D = -(-prediction_D // capacity)
    offset_P = (np.arange(count_D.sum()) - np.repeat(np.cumsum(count_D) - count_D, count_D)) * capacity
    length_P = np.minimum(np.repeat(prediction_D, count_D) - offset_P, capacity)
    return np.repeat(start_D, count_D) + offset_P, length_P.astype(np.int32)


def best_fit(length_P: NDArray[np.int32], capacity: int) -> NDArray[np.int64]:
    """The row of each piece by best-fit decreasing: longest first, each into the fullest row with room for
    it.

    Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3. Pieces of equal length and
    rows with equal space are handled together: N pieces cost a sort and O(L log L) moves of groups of rows,
    since a row with space s that takes all it can of a length keeps less than s / 2. Every length is from 1
    to `capacity`.
    """
    assert len(length_P) == 0 or (length_P.min() >= 1 and length_P.max() <= capacity)
    row_P = np.empty(len(length_P), np.int64)
    longest_first = np.argsort(-length_P, kind="stable")
    groups = np.split(longest_first, np.flatnonzero(np.diff(length_P[longest_first])) + 1)
    rooms = _Rooms(capacity)
    for piece_N in groups if len(length_P) else []:
        length = int(length_P[piece_N[0]])
        for space in rooms.at_least(length):
            if len(piece_N) == 0:
                break
            each = space // length
            row_R = rooms.take(space, -(-len(piece_N) // each))
            here, piece_N = np.split(piece_N, [len(row_R) * each])
            row_P[here] = np.repeat(row_R, each)[: len(here)]
            # All rows take `each` pieces but for the last one, which takes what is left.
            rooms.give(row_R[:-1], space - each * length)
            rooms.give(row_R[-1:], space - (len(here) - each * (len(row_R) - 1)) * length)
    return row_P


class _Rooms:
    """Rows by the space that is left in them; new ones, of full capacity, without end."""

    def __init__(self, capacity: int):
        self._capacity, self._made = capacity, 0
        self._rows: defaultdict[int, list[NDArray[np.int64]]] = defaultdict(list)
        self._count_S = np.zeros(capacity, np.int64)

    def at_least(self, space: int) -> list[int]:
        """Spaces of at least this that rows have, the smallest first."""
        return [*(np.flatnonzero(self._count_S[space:]) + space).tolist(), self._capacity]

    def take(self, space: int, most: int) -> NDArray[np.int64]:
        """Up to `most` rows that have exactly this space; of full capacity, `most` new ones."""
        if space == self._capacity:
            self._made += most
            return np.arange(self._made - most, self._made)
        groups = self._rows.pop(space)
        taken, left = np.split(groups[0] if len(groups) == 1 else np.concatenate(groups), [most])
        self._count_S[space] = 0
        self.give(left, space)
        return taken

    def give(self, row_R: NDArray[np.int64], space: int) -> None:
        """Rows with this space left; full ones are done with."""
        if len(row_R) and space:
            self._rows[space].append(row_R)
            self._count_S[space] += len(row_R)
