"""One piece of a parameter as the bytes of a codec, and back: its numbers in one row, filled up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.errors import JobError
from shoal.sync.codec.blocks import Blocks
from shoal.sync.codec.protocol import SizedCodec
from shoal.sync.server.messages import Piece


def to_bytes(codec: SizedCodec, tensor: Tensor) -> Tensor:
    """uint8, as long as the number of elements says. tensor: float32 or float64; it stays as it is."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    row_1N = tensor.reshape(1, -1)
    if last := row_1N.shape[1] % codec.granule:
        filling_1M = row_1N.new_zeros(1, codec.granule - last)
        if isinstance(codec, Blocks):
            # With its own numbers again: zeros would make their mean less, of a scalar 64 times.
            filling_1M = row_1N[:, torch.arange(codec.granule - last, device=row_1N.device) % last - last]
        row_1N = torch.cat([row_1N, filling_1M], 1)
    return codec.encode(row_1N)[0]


def from_bytes(codec: SizedCodec, payload: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
    """The piece, of its own shape. Raises JobError for bytes that are not as many as the codec writes of it."""
    numbers = math.prod(piece.shape)
    length = codec.row_bytes(numbers + -numbers % codec.granule) if numbers else 0
    if payload.dtype != torch.uint8 or payload.numel() != length:
        raise JobError(
            f"{payload.numel()} bytes of {payload.dtype} came for {piece.name} {list(piece.shape)}, not {length}",
            fix="start all workers and servers from the same job.toml",
        )
    if not numbers:
        return torch.empty(piece.shape, dtype=dtype, device=payload.device)
    return codec.decode(payload.reshape(1, -1), dtype)[0, :numbers].view(piece.shape)
