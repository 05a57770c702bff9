"""Numbers in blocks of 64, each with a scale of its own: what lies far away in a tensor does not coarsen them.

Source: the block-wise quantisation of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
section 2.1; the levels here are evenly spaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from shoal.ops.counter import draw, hashes
from shoal.sync.codec.bits import pack, read_as, unpack
from shoal.sync.codec.draws import Draws
from shoal.sync.codec.protocol import check_length

BLOCK = 64

# Blocks that are worked on together: what lies between two operations stays in the cache. Of 10 million numbers at
# once, four fifths of the time go into memory that is new each time.
_TOGETHER = 1 << 13

# The smallest normal number of bfloat16. A scale below it would have fewer significant bits.
_SMALLEST = 2.0**-126


class Blocks(ABC):
    """Encodes block by block, whatever rows they belong to.

    block_bytes: scales and codes, in this order. draws: where random numbers come from, None = none are needed.
    """

    granule = BLOCK
    block_bytes: int
    draws: Draws | None = None

    def row_bytes(self, numbers: int) -> int:
        return numbers // BLOCK * self.block_bytes

    def encode(self, values_RN: Tensor) -> Tensor:
        check_length(self, values_RN)
        values_KN = widened(values_RN).reshape(-1, BLOCK)
        payload_KB = torch.empty(len(values_KN), self.block_bytes, dtype=torch.uint8, device=values_RN.device)
        key = self.draws.keys(1, values_RN.device) if self.draws else None
        for first in range(0, len(values_KN), _TOGETHER):
            some = slice(first, first + _TOGETHER)
            drawn_KN = None if key is None else _uniform(key, first, len(values_KN[some]))
            self._write(values_KN[some], payload_KB[some], drawn_KN)
        return payload_KB.view(len(values_RN), -1)

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        payload_KB = payload_RB.reshape(-1, self.block_bytes)
        values_KN = torch.empty(len(payload_KB), BLOCK, dtype=dtype, device=payload_RB.device)
        wide = dtype if dtype == torch.float64 else torch.float32
        for first in range(0, len(payload_KB), _TOGETHER):
            some = slice(first, first + _TOGETHER)
            values_KN[some] = self._read(payload_KB[some], wide)
        return values_KN.view(len(payload_RB), -1)

    @abstractmethod
    def _write(self, values_KN: Tensor, payload_KB: Tensor, drawn_KN: Tensor | None) -> None:
        """Fills the payload of these blocks of float32 or float64. drawn: uniform in [0, 1), where there are draws."""

    @abstractmethod
    def _read(self, payload_KB: Tensor, dtype: torch.dtype) -> Tensor:
        """In float32 or float64."""


class Integers(Blocks):
    """Multiples q s of a block's scale s = max|x| / L, which is in bfloat16, q a whole number from −L to L.

    q = x/s to the nearest, ties to even: off by at most s/2, and by at most |x| itself, so never longer than x. The
    largest is off by ε of itself, |ε| ≤ 2**-8 from the rounding of s, so with a = 63 (1 + ε)² / (4 L²)
    ‖x − C(x)‖² ≤ (a + ε²) / (1 + a) ‖x‖²: 0.0010 of it in 8 bits, 0.245 in 4, from max|x| = L 2**-126 on. Most is
    lost where 63 numbers are half a step and one is L steps.
    With `draws`, q = ⌊x/s + u⌋, u uniform in [0, 1) and s rounded up: off by less than s, and by 0 on average over u
    (Alistarh et al. 2017, "QSGD", section 3.1, with max|x| in place of the norm). s is at least 2**-126.

    In 8 bits L = 127, and 64 numbers take 66 bytes, 0.258 of float32's; in 4 bits L = 7, 34 bytes, 0.133.
    """

    def __init__(self, width: int, draws: Draws | None = None):
        """width: bits of a number, 8 or 4; q + L + 1 is what is packed. draws: of u, None = to the nearest."""
        self.width, self.draws = width, draws
        self.most = 2 ** (width - 1) - 1
        self.block_bytes = 2 + BLOCK * width // 8

    def _write(self, values_KN: Tensor, payload_KB: Tensor, drawn_KN: Tensor | None) -> None:
        largest_K1 = torch.maximum(values_KN.amax(1, keepdim=True), -values_KN.amin(1, keepdim=True)).float()
        scale_K1 = bf16(largest_K1.div_(self.most).clamp_min_(_SMALLEST), up=drawn_KN is not None)
        codes_KN = values_KN / scale_K1.to(values_KN.dtype)
        if drawn_KN is None:
            # To the nearest of 8 bits, the scale of the largest number moves that number's q by less than 1/2.
            codes_KN.round_()
        else:
            codes_KN.add_(drawn_KN).floor_().clamp_(-self.most, self.most)
        payload_KB[:, :2] = scale_K1.view(torch.uint8)
        payload_KB[:, 2:] = pack(codes_KN.add_(self.most + 1).to(torch.uint8), self.width)

    def _read(self, payload_KB: Tensor, dtype: torch.dtype) -> Tensor:
        scale_K1 = read_as(payload_KB[:, :2], torch.bfloat16)
        return unpack(payload_KB[:, 2:], self.width).to(dtype).sub_(self.most + 1).mul_(scale_K1.to(dtype))


def widened(values: Tensor) -> Tensor:
    """In float64 what is, all else in float32."""
    return values if values.dtype == torch.float64 else values.float()


def bf16(scale_K1: Tensor, up: bool = False) -> Tensor:
    """float32 -> bfloat16, to the nearest or up; NaN where it is not finite. Not negative."""
    finite_K1 = scale_K1.isfinite()
    if up:
        scale_K1 = (scale_K1.view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(finite_K1, scale_K1.to(torch.bfloat16), torch.nan)


def _uniform(key: Tensor, first: int, blocks: int) -> Tensor:
    """(K, 64) multiples of 2**-24 in [0, 1), by key (one number) and place."""
    key_K = draw(key, torch.arange(first, first + blocks, device=key.device))
    return (hashes(key_K, 0, BLOCK) >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)
