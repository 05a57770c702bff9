"""Messages as frames: the message is the header, its tensors are the buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from shoal.sync.server import messages as m
from shoal.sync.server.messages import Address
from shoal.sync.server.node.pool import Pool
from shoal.sync.server.rows import fits, shapes
from shoal.sync.server.wire import FrameError


def buffers(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As they travel: contiguous."""
    return [tensor.detach().contiguous() for tensor in tensors]


def read(header: bytes) -> m.AnyMessage:
    """The message of a frame. FrameError where it is none."""
    try:
        return m.decode(header)
    except msgspec.DecodeError as error:
        raise FrameError("no message", f"sent what is no message: {error}") from None


def places(message: m.AnyMessage, lengths: Sequence[int], dtype: torch.dtype, pool: Pool | None = None) -> list[Tensor]:
    """Memory for the tensors that come with a message: of the pool, or new. dtype: of weights and gradients, unless
    they are encoded.

    FrameError where there are more or fewer of them than the message says, or of other shapes.
    """
    take = (pool or Pool(0)).take
    pieces: Sequence[m.Piece] = message.pieces if isinstance(message, m.Stage | m.Pulled | m.Whole | m.Backup) else ()
    encoded = isinstance(message, m.Stage | m.Pulled) and message.encoded
    # Of a chain of deltas each has all pieces.
    often = len(message.links) if encoded and isinstance(message, m.Pulled) else 1
    if len(pieces) * often != len(lengths):
        raise FrameError("does not fit", f"sent {len(lengths)} tensors with {type(message).__name__}")
    if encoded:
        return [take((length,), torch.uint8) for length in lengths]
    rows = message.rows if isinstance(message, m.Pulled) else ()
    if not fits(pieces, rows):
        raise FrameError("does not fit", "sent rows of what it does not send")
    found = shapes(pieces, rows)
    # Before any memory is taken for them.
    expected = [math.prod(shape) * dtype.itemsize for shape in found]
    if [*lengths] != expected or any(number < 0 for shape in found for number in shape):
        raise FrameError("does not fit", f"sent tensors of other lengths with {type(message).__name__} than it says")
    return [take(shape, dtype) for shape in found]


def name(who: Address) -> str:
    """How a side calls itself when it connects."""
    return f"{who.role} {who.number} {who.copy}"


def address(name: str) -> Address:
    """Who it is. FrameError for a name that is none."""
    role, *numbers = name.split(" ")
    if role not in ("worker", "shard", "coordinator", "reader") or len(numbers) != 2:
        raise FrameError("no name", f"calls itself {name!r}")
    try:
        return Address(role, *map(int, numbers))
    except ValueError:
        raise FrameError("no name", f"calls itself {name!r}") from None
