"""A rank's own copy of the shards' shadows: pulled once, then moved by the deltas that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.sync.codec import codec_of
from shoal.sync.server.messages import NO_CHAIN, Chain, Piece, Pulled
from shoal.sync.server.payload import from_bytes
from shoal.sync.server.pieces import cut, lies_in


class _Copy(NamedTuple):
    """wanted: as it was asked for. tensors: of each of `pieces`."""

    chain: Chain
    version: int
    wanted: tuple[Piece, ...] | None
    pieces: tuple[Piece, ...]
    tensors: tuple[Tensor, ...]


class Follower:
    """One for each rank of a worker, for as long as its process lives: also a fenced worker goes on from what it holds.

    Memory: the rank's pieces once.
    """

    def __init__(self, codec: str):
        self.codec = codec_of(codec)
        self._copies: dict[int, _Copy] = {}

    def holds(self, shard: int, wanted: tuple[Piece, ...] | None) -> tuple[Chain, int]:
        """What to say in a Pull of these pieces: chain and version, the latter −1 where it has to be dense."""
        held = self._copies.get(shard)
        return (held.chain, held.version) if held is not None and held.wanted == wanted else (NO_CHAIN, -1)

    @torch.no_grad()
    def take(
        self, message: Pulled, tensors: Sequence[Tensor], wanted: tuple[Piece, ...] | None
    ) -> tuple[tuple[Piece, ...], tuple[Tensor, ...]] | None:
        """(pieces, their weights at `message.version`), or None where it does not go on from what is held here.

        The weights are the rank's copy itself: to be read until the next `take`, and not to be changed. Raises JobError
        for bytes of another codec.
        """
        if message.base < 0:
            # Whoever sent them may go on using them, as in a simulation.
            held = _Copy(
                message.chain, message.version, wanted, message.pieces, tuple(tensor.clone() for tensor in tensors)
            )
        else:
            known = self._copies.get(message.shard)
            if known is None or (known.chain, known.version) != (message.chain, message.base):
                return None
            del self._copies[message.shard]
            self._move(known, message, tensors)
            held = known._replace(version=message.version)
        self._copies[message.shard] = held
        return held.pieces, held.tensors

    def _move(self, held: _Copy, message: Pulled, tensors: Sequence[Tensor]) -> None:
        """Delta by delta: their sum, added at once, would be rounded in another way."""
        of: dict[str, list[tuple[Piece, Tensor]]] = {}
        for piece, tensor in zip(held.pieces, held.tensors, strict=True):
            of.setdefault(piece.name, []).append((piece, tensor))
        for place in range(len(message.links)):
            payloads = tensors[place * len(message.pieces) :][: len(message.pieces)]
            for block, payload in zip(message.pieces, payloads, strict=True):
                step = from_bytes(self.codec, payload, block, held.tensors[0].dtype)
                for piece, tensor in of[block.name]:
                    if lies_in(piece, block.offsets, block.shape):
                        tensor += cut(step, block.offsets, piece)
