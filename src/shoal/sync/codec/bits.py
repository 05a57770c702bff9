"""Bytes as numbers, and numbers of 1, 2, 4 or 8 bits packed into bytes: the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = {8: torch.uint8, 4: torch.int16, 2: torch.int32, 1: torch.int64}
"""Of as many bytes as there are numbers in one of the bytes that come out."""


def read_as(bytes_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of which these are the bytes. A copy where they are scattered, or lie where no number may begin."""
    flat = bytes_RB.reshape(-1)
    if flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(len(bytes_RB), -1)


def pack(codes_KN: Tensor, width: int) -> Tensor:
    """uint8 numbers below 2**width, N a multiple of 8 -> uint8, width / 8 as many."""
    word_KM = codes_KN.view(_WORDS[width])
    for shift, _ in _steps(width):
        # Neighbours, then pairs, then fours move together; what is left over lies above the lowest byte.
        word_KM = word_KM | word_KM >> shift
    return word_KM.bitwise_and_(0xFF).to(torch.uint8)


def unpack(packed_KM: Tensor, width: int) -> Tensor:
    """uint8 -> the numbers that were packed, uint8, in as many rows."""
    word_KM = packed_KM.to(_WORDS[width])
    for shift, mask in reversed(_steps(width)):
        word_KM = (word_KM << shift).bitwise_or_(word_KM).bitwise_and_(mask)
    return word_KM.view(torch.uint8)


def _steps(width: int) -> list[tuple[int, int]]:
    """Of each step of packing by how far it shifts, and the bits that were in use before it."""
    word = 64 // width
    sizes = [(width << doubling, 8 << doubling) for doubling in range((8 // width).bit_length() - 1)]
    return [(room - size, sum((1 << size) - 1 << place for place in range(0, word, room))) for size, room in sizes]
