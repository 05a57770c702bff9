"""Boxes of stored tensors, block by block through one buffer: no file is mapped, and no more of it held than a block.

Under a limit of memory, what is mapped counts (`ulimit -v`) or may count (a container's page cache), so files are read.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import product
from math import prod
from operator import mul
from pathlib import Path
from typing import NamedTuple

from shoal.checkpoint.manifest import ANOTHER, Piece, Tensor, intersect
from shoal.errors import CheckpointError

# Bytes read at a time: little beside any tensor that matters. Larger blocks gain little (measured on files in the page
# cache: 0.61 s for 400 MB, against 0.63 s with 256 KiB and 0.59 s with 4 MiB).
BLOCK = 1 << 20
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class Box(NamedTuple):
    """A part of a tensor: where it starts in the whole, and its shape."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def within(self, other: Box | None = None) -> tuple[slice, ...]:
        """As slices of a box that it lies in; None = of the whole."""
        origin = other.offsets if other else (0,) * len(self.offsets)
        return tuple(slice(o - at, o - at + n) for o, n, at in zip(*self, origin, strict=True))


def whole(tensor: Tensor) -> Box:
    return Box((0,) * len(tensor.shape), tensor.shape)


def size(tensor: Tensor) -> int:
    """Bytes of all its elements."""
    return prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def split(box: Box, limit: int) -> Iterator[Box]:
    """The box in boxes of at most `limit` elements, each contiguous in it, in the order of storage (row by row)."""
    offsets, shape = box
    if not prod(shape):
        return
    row = prod(shape[1:])
    if prod(shape) <= limit:
        yield box
    elif row <= limit:
        for start in range(0, shape[0], limit // row):
            rows = min(limit // row, shape[0] - start)
            yield Box((offsets[0] + start, *offsets[1:]), (rows, *shape[1:]))
    else:
        for start in range(shape[0]):
            for inner in split(Box(offsets[1:], shape[1:]), limit):
                yield Box((offsets[0] + start, *inner.offsets), (1, *inner.shape))


def stream(folder: Path, tensor: Tensor, box: Box, buffer: memoryview) -> Iterator[tuple[Box, memoryview]]:
    """The bytes of a box of a tensor, row by row, block by block: each with its place in the tensor. They lie in
    `buffer` (BLOCK bytes) until the next one.

    Raises CheckpointError for a file that is gone, or shorter than the manifest says.
    """
    item = ITEM_BYTES[tensor.dtype]
    pieces = sorted(tensor.pieces, key=lambda piece: piece.offsets[:1])
    starts = [piece.offsets[:1] for piece in pieces]
    tallest = max((piece.shape[0] for piece in pieces if piece.shape), default=0)
    for block in split(box, len(buffer) // item):
        view = buffer[: prod(block.shape) * item]
        first, last = 0, len(pieces)
        if block.shape:  # of many ranks' pieces, those that may reach into these rows
            first = bisect_right(starts, (block.offsets[0] - tallest,))
            last = bisect_left(starts, (block.offsets[0] + block.shape[0],))
        for piece in pieces[first:last]:
            common = intersect(piece.offsets, piece.shape, *block)
            if common:
                read(folder, piece, Box(*common), item, view, block)
        yield block, view


def read(folder: Path, piece: Piece, box: Box, item: int, into: memoryview, block: Box) -> None:
    """Reads `box`, which lies in the piece and in the block, to its place in `into`, the bytes of the block.

    item: bytes of an element. Raises CheckpointError.
    """
    path = folder / piece.file
    try:
        with open(path, "rb", buffering=0) as file:
            for source, target, count in _runs(box, Box(piece.offsets, piece.shape), block):
                at, view = piece.bytes[0] + source * item, into[target * item : (target + count) * item]
                while view:
                    got = os.preadv(file.fileno(), [view], at)
                    if not got:
                        what = "is damaged: a tensor reaches beyond its end"
                        raise CheckpointError(what, where=str(path), fix=ANOTHER)
                    at, view = at + got, view[got:]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path), fix=ANOTHER) from None


def _runs(box: Box, piece: Box, block: Box) -> Iterator[tuple[int, int, int]]:
    """(element of the piece, element of the block, elements) of stretches of `box` that are contiguous in both."""
    axis = max(len(box.shape) - 1, 0)
    # What has all of a dimension in both goes on in the next row without a gap.
    while axis > 0 and box.shape[axis] == piece.shape[axis] == block.shape[axis]:
        axis -= 1
    count = prod(box.shape[axis:])
    begins, strides = zip(*(_place(box.offsets, other) for other in (piece, block)), strict=True)
    for index in product(*map(range, box.shape[:axis])):
        source, target = (begin + sum(map(mul, index, stride)) for begin, stride in zip(begins, strides, strict=True))
        yield source, target, count


def _place(offsets: tuple[int, ...], box: Box) -> tuple[int, list[int]]:
    """Number of the element at `offsets` among those of the box, row by row; and by how much a step in each dimension
    adds to it."""
    strides = [prod(box.shape[axis + 1 :]) for axis in range(len(box.shape))]
    return sum(map(mul, (o - b for o, b in zip(offsets, box.offsets, strict=True)), strides)), strides
