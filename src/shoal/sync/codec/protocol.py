"""What a codec is."""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Numbers to bytes and back, row by row: each row can be read without the others.

    A row that has a NaN or an infinity comes back with something that is not finite, other rows as if it were not
    there. Numbers of up to 2**127 stay finite. Zeros alone come back as zeros.
    """

    granule: int
    """A row's length is a multiple of it."""

    def encode(self, values_RN: Tensor) -> Tensor:
        """Rows of numbers -> uint8 rows, whose length depends on N alone. float32, float64, bfloat16 or float16."""
        ...

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers that `encode` wrote; not finite where they were not."""
        ...


class SizedCodec(Codec, Protocol):
    """Of which the bytes of a row tell how many numbers are in it, whatever their dtype."""

    def row_bytes(self, numbers: int) -> int:
        """Bytes of an encoded row of so many numbers; more for more of them."""
        ...


def check_length(codec: Codec, values_RN: Tensor) -> None:
    """Rows that are no multiple of the granule would be cut across each other."""
    assert values_RN.shape[1] % codec.granule == 0, f"rows of {values_RN.shape[1]} for a granule of {codec.granule}"


def numbers_in(codec: SizedCodec, row_bytes: int) -> int:
    """How many numbers there are in an encoded row: `row_bytes` the other way round."""
    # Every granule has at least a byte.
    granules = bisect_left(range(row_bytes + 1), row_bytes, key=lambda many: codec.row_bytes(many * codec.granule))
    numbers = granules * codec.granule
    assert codec.row_bytes(numbers) == row_bytes, f"no row has {row_bytes} bytes"
    return numbers
