"""Each number by itself rounded to the nearest of a shorter floating-point type, or to none."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.sync.codec.bits import read_as


class Float32:
    """float32 as it is: for what another codec keeps."""

    granule = 1

    def row_bytes(self, numbers: int) -> int:
        return 4 * numbers

    def encode(self, values_RN: Tensor) -> Tensor:
        return values_RN.float().contiguous().view(torch.uint8)

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        return read_as(payload_RB, torch.float32).to(dtype)


class Bf16:
    """bfloat16: float32's range, 8 significant bits; each number off by at most 2**-8 of itself.

    Source: Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training".
    """

    granule = 1

    def row_bytes(self, numbers: int) -> int:
        return 2 * numbers

    def encode(self, values_RN: Tensor) -> Tensor:
        return values_RN.to(torch.bfloat16).view(torch.uint8)

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        return read_as(payload_RB, torch.bfloat16).to(dtype)


class Fp16:
    """float16 after a row has been scaled by a power of two: 11 significant bits.

    Scaled, a row's largest number lies between 2**14 and 2**15, so that sums over however many tokens cannot
    overflow. Numbers from 2**-28 of the largest on are off by at most 2**-11 of themselves, smaller ones by 2**-39 of
    the largest.

    Source: the loss scale of Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, chosen by row.
    """

    granule = 2
    """So that rows, with 4 bytes for the scale, stay aligned."""

    def row_bytes(self, numbers: int) -> int:
        return 4 + 2 * numbers

    def encode(self, values_RN: Tensor) -> Tensor:
        largest_R1 = values_RN.abs().amax(1, keepdim=True).float()
        exponent_R1 = torch.frexp(largest_R1).exponent - 15
        scale_R1 = torch.ldexp(torch.ones_like(largest_R1), exponent_R1)
        scale_R1 = torch.where(largest_R1.isfinite(), scale_R1.clamp_min(2.0**-126), torch.nan)
        scaled_RN = (values_RN / scale_R1.to(values_RN.dtype)).to(torch.float16)
        return torch.cat([scale_R1.view(torch.uint8), scaled_RN.view(torch.uint8)], 1)

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        scale_R1 = read_as(payload_RB[:, :4], torch.float32)
        return read_as(payload_RB[:, 4:], torch.float16).to(dtype).mul_(scale_R1)
