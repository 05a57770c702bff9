"""Rows of large embeddings by themselves: those that a batch has gradients for, those that it needs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from torch import Tensor

from shoal.sync.server.messages import Piece


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


def rows_wanted(piece: Piece, rows: Iterable[int]) -> tuple[Piece, ...]:
    """The parts of a piece that have these rows of the whole parameter, for a pull; rows elsewhere are passed over."""
    start, many = piece.offsets[0], piece.shape[0]
    found = sorted({row - start for row in rows if start <= row < start + many})
    return tuple(_rows(piece, first, stop) for first, stop in _runs(found))


def _rows(piece: Piece, start: int, stop: int) -> Piece:
    return Piece(piece.name, (piece.offsets[0] + start, *piece.offsets[1:]), (stop - start, *piece.shape[1:]))


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """(first, last + 1) of each run of numbers that follow each other. rows: in order."""
    runs = [[row for _, row in run] for _, run in groupby(enumerate(rows), lambda numbered: numbered[1] - numbered[0])]
    return [(run[0], run[-1] + 1) for run in runs]
