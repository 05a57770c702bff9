"""Where one block of a parameter lies in another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoal.sync.server.messages import Piece


def lies_in(piece: Piece, offsets: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether all of it is in the block of its parameter that has this place and shape. What is no piece, as of another
    number of dimensions, is in none."""
    if not len(piece.offsets) == len(piece.shape) == len(shape) or any(size < 0 for size in piece.shape):
        return False
    ends = zip(piece.offsets, piece.shape, offsets, shape, strict=True)
    return all(low <= start and start + size <= low + held for start, size, low, held in ends)


def cut(block: Tensor, offsets: Sequence[int], piece: Piece) -> Tensor:
    """The part of a block that is meant, a view. offsets: where the block starts in the whole parameter."""
    for dimension, (start, low, size) in enumerate(zip(piece.offsets, offsets, piece.shape, strict=True)):
        block = block.narrow(dimension, start - low, size)
    return block
