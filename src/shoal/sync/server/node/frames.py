"""Messages as frames: the message is the header, its tensors are the buffers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from shoal.sync.server import messages as m
from shoal.sync.server.messages import Address
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


def places(message: m.AnyMessage, lengths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """New memory for the tensors that come with a message. dtype: of weights and gradients, unless they are encoded.

    FrameError where there are more or fewer of them than the message says.
    """
    if getattr(message, "encoded", False):
        return [torch.empty(length, dtype=torch.uint8) for length in lengths]
    pieces: Sequence[m.Piece] = message.pieces if isinstance(message, m.Stage | m.Pulled | m.Whole | m.Backup) else ()
    if len(pieces) != len(lengths):
        raise FrameError("does not fit", f"sent {len(lengths)} tensors with {type(message).__name__}")
    return [torch.empty(piece.shape, dtype=dtype) for piece in pieces]


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
