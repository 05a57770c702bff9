"""Rows of large embeddings by themselves: those that a batch has gradients for, those that it needs.

A worker pulls its working set, the parameters that occur in its part of the data (Li et al. 2014, "Scaling Distributed
Machine Learning with the Parameter Server", section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.sync.server.messages import Piece, Rows


def sparse_pieces(piece: Piece, tensor: Tensor, most: float = 0.5) -> list[tuple[Piece, Tensor]]:
    """A gradient as its runs of rows that are not zero, with views of them; whole, where these are more than `most`.

    most: a share of the rows, which are along the first dimension. Exact: a shard stages into zeros, so what does not
    travel is there. A row of negative zeros travels; where all rows are zero, nothing does.
    """
    if not tensor.dim() or not tensor.numel():
        return [(piece, tensor)]
    found = ((tensor != 0) | tensor.signbit()).reshape(len(tensor), -1).any(1).nonzero()[:, 0].tolist()
    if len(found) > most * len(tensor):
        return [(piece, tensor)]
    return [(_rows(piece, start, stop), tensor[start:stop]) for start, stop in _runs(found)]


def rows_wanted(pieces: Sequence[Piece], name: str, row_N: NDArray[np.int64], itemsize: int) -> tuple[Rows, ...]:
    """What to ask of the pieces of this parameter, in a pull of `pieces`: these rows of the whole parameter, where all
    rows of a piece take more bytes.

    itemsize: bytes of a number. What says which rows travels in the question and again in the answer.
    """
    found = []
    for place, piece in enumerate(pieces):
        if piece.name != name:
            continue
        start, many = piece.offsets[0], piece.shape[0]
        wanted = np.zeros(many, np.bool_)
        wanted[row_N[(row_N >= start) & (row_N < start + many)] - start] = True
        bits = np.packbits(wanted, bitorder="little").tobytes()
        left_out = int(many - wanted.sum()) * math.prod(piece.shape[1:]) * itemsize
        if left_out > 2 * len(bits):
            found.append(Rows(place, bits))
    return tuple(found)


def fits(pieces: Sequence[Piece], rows: Sequence[Rows]) -> bool:
    """Whether these are rows of these pieces, of each at most once."""
    places = [place for place, _ in rows]
    return places == sorted(set(places)) and all(
        0 <= place < len(pieces) and _has(pieces[place], bits) for place, bits in rows
    )


def _has(piece: Piece, bits: bytes) -> bool:
    many = piece.shape[0] if piece.shape else 0
    return many > 0 and len(bits) == -(-many // 8) and int.from_bytes(bits, "little").bit_length() <= many


def shapes(pieces: Sequence[Piece], rows: Sequence[Rows]) -> list[tuple[int, ...]]:
    """Of the tensors that travel with these pieces, of some of them only rows, that fit."""
    found = [piece.shape for piece in pieces]
    for place, bits in rows:
        found[place] = (int.from_bytes(bits, "little").bit_count(), *found[place][1:])
    return found


def picked(tensors: Sequence[Tensor], rows: Sequence[Rows]) -> tuple[Tensor, ...]:
    """These tensors, of some of them only rows, in memory of their own."""
    found = list(tensors)
    for place, bits in rows:
        found[place] = found[place].index_select(0, numbers(bits).to(found[place].device))
    return tuple(found)


def numbers(bits: bytes) -> Tensor:
    """Which rows of a piece they are, int64, in order."""
    return torch.from_numpy(np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")))


def _rows(piece: Piece, start: int, stop: int) -> Piece:
    return Piece(piece.name, (piece.offsets[0] + start, *piece.offsets[1:]), (stop - start, *piece.shape[1:]))


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of numbers that follow each other. rows: in order."""
    runs = [[row for _, row in run] for _, run in groupby(enumerate(rows), lambda numbered: numbered[1] - numbered[0])]
    return [(run[0], run[-1] + 1) for run in runs]
