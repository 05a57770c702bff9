"""What one rank of a worker exchanges with which server shard: where its own pieces overlap with the shard's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.checkpoint.manifest import intersect
from shoal.shard import Shard
from shoal.sync.server.messages import Piece, Rows
from shoal.sync.server.placement import Block
from shoal.sync.server.rows import numbers


@dataclass(frozen=True)
class Cut:
    """A piece of one parameter that lies in `shard`, a piece of this rank, and in a block of a server shard."""

    piece: Piece
    shard: Shard

    def of(self, tensor: Tensor) -> Tensor:
        """Of a tensor like the rank's own piece, the part that is meant: a view."""
        for dimension, (start, low, size) in enumerate(
            zip(self.piece.offsets, self.shard.offsets, self.piece.shape, strict=True)
        ):
            tensor = tensor.narrow(dimension, start - low, size)
        return tensor


def cuts(shards: Iterable[Shard], placement: Sequence[Sequence[Block]]) -> dict[int, list[Cut]]:
    """For each server shard, what this rank has in common with it, in the order of the rank's pieces."""
    found: dict[int, list[Cut]] = {number: [] for number in range(len(placement))}
    where: dict[str, list[tuple[int, Block]]] = {}
    for number, blocks in enumerate(placement):
        for block in blocks:
            where.setdefault(block.name, []).append((number, block))
    for shard in shards:
        for number, block in where[shard.name]:
            common = intersect(tuple(shard.offsets), tuple(shard.local.shape), *_box(block, shard.global_shape))
            if common is not None:
                found[number].append(Cut(Piece(shard.name, *common), shard))
    return found


def _box(block: Block, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not shape:
        return (), ()
    rest = tuple(shape[1:])
    return (block.start, *[0] * len(rest)), (block.stop - block.start, *rest)


@torch.no_grad()
def fill(cuts: Sequence[Cut], pieces: Sequence[Piece], tensors: Sequence[Tensor], rows: Sequence[Rows] = ()) -> None:
    """Copies what was pulled to where it belongs: a rank with two stages of a pipeline may hold a piece twice.

    rows: of which pieces only rows came; the others stay as they were.
    """
    pulled: Mapping[Piece, Tensor] = dict(zip(pieces, tensors, strict=True))
    some = {pieces[place]: numbers(bits) for place, bits in rows}
    for cut in cuts:
        mine, came = cut.of(cut.shard.local), pulled[cut.piece]
        if (row_N := some.get(cut.piece)) is None:
            mine.copy_(came)
        else:
            mine.index_copy_(0, row_N.to(mine.device), came.to(mine))
