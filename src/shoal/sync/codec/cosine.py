"""The largest coefficients of a discrete cosine transform."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from shoal.sync.codec.blocks import widened
from shoal.sync.codec.protocol import SizedCodec
from shoal.sync.codec.sparse import TopK

_CHUNK = 64
# A coefficient is at most this many times as large as the largest of the numbers: the root of 64, a power of two.
_GAIN = 8


class Dct:
    """Every 64 numbers in a row through an orthonormal DCT-II, of whose coefficients a top-k is written.

    Lengths stay as they are, so its error is bounded like that of the top-k. Source: Peng, Quesnelle & Kingma 2024,
    "DeMo: Decoupled Momentum Optimization", section 3; there matrices are cut in squares of 64 × 64, but a row here has
    lost their shape, and what is written there is a momentum that decays, less what was sent of it before. The
    transform is a matrix product: all ranks need the same kind of device to decode the same bits.
    """

    def __init__(self, share: float, values: SizedCodec):
        """As for `TopK`."""
        self.top = TopK(share, values)
        self.granule = self.top.granule

    def row_bytes(self, numbers: int) -> int:
        return self.top.row_bytes(numbers)

    def encode(self, values_RN: Tensor) -> Tensor:
        values_KN = widened(values_RN).reshape(-1, _CHUNK)
        # Coefficients travel as 1/8 of what they are, so that they are no larger than the largest number.
        part_KN = values_KN @ (_basis(values_KN.dtype, values_KN.device).T / _GAIN)
        return self.top.encode(part_KN.view(len(values_RN), -1))

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        wide = dtype if dtype == torch.float64 else torch.float32
        part_RN = self.top.decode(payload_RB, wide)
        values_KN = part_RN.view(-1, _CHUNK) @ _basis(wide, part_RN.device)
        # Without all coefficients, numbers may come out larger than they were. NaN stays NaN.
        most = torch.finfo(wide).max / _GAIN
        return values_KN.clamp_(-most, most).mul_(_GAIN).view(len(payload_RB), -1).to(dtype)


@cache
def _basis(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(64, 64), orthonormal: row f is the cosine of f half periods over the chunk."""
    place_N = torch.arange(_CHUNK, dtype=torch.float64)
    basis_FN = torch.cos(torch.pi / _CHUNK * (place_N + 0.5) * place_N[:, None]) * (2 / _CHUNK) ** 0.5
    basis_FN[0] = _CHUNK**-0.5
    return basis_FN.to(device, dtype)
