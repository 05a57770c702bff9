"""Signs in blocks of 64, with one magnitude or one of two magnitudes for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.sync.codec.bits import pack, read_as, unpack
from shoal.sync.codec.blocks import BLOCK, Blocks, bf16


class Sign(Blocks):
    """s where x ≥ 0, else −s; s = mean |x| of the block, in bfloat16. 10 bytes for 64 numbers, 0.039 of float32's.

    ‖x − C(x)‖² = (1 − φ) ‖x‖² with φ = ‖x‖₁² / (d ‖x‖₂²) of a block of d, but for the rounding of s: at most 2**-16 φ
    less. A 0 among other numbers comes back as s.

    Source: Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Bernstein et al. 2018, "signSGD"; this scale and φ:
    Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", section 4.
    """

    block_bytes = 2 + BLOCK // 8

    def _write(self, values_KN: Tensor, payload_KB: Tensor, drawn_KN: Tensor | None) -> None:
        payload_KB[:, :2] = bf16(_shares(values_KN).sum(1, keepdim=True).float()).view(torch.uint8)
        payload_KB[:, 2:] = pack((values_KN < 0).view(torch.uint8), 1)

    def _read(self, payload_KB: Tensor, dtype: torch.dtype) -> Tensor:
        scale_K1 = read_as(payload_KB[:, :2], torch.bfloat16).to(dtype)
        return unpack(payload_KB[:, 2:], 1).to(dtype).mul_(-2).add_(1).mul_(scale_K1)


class Int2(Blocks):
    """A sign and one of two magnitudes: the mean of those |x| that are above the block's mean |x|, and the mean of the
    others, in bfloat16. 20 bytes for 64 numbers, 0.078 of float32's.

    No one magnitude is nearer to several than their mean (a step of Lloyd 1982, "Least squares quantization in PCM"),
    so but for rounding it is never further from x than `Sign`, and where numbers are of one order, as those that a
    top-k keeps, much nearer. Of four evenly spaced levels none would be 0, and a block of mostly small numbers would
    come back longer than it was. A 0 among others comes back as the lesser magnitude.
    """

    block_bytes = 4 + BLOCK // 4

    def _write(self, values_KN: Tensor, payload_KB: Tensor, drawn_KN: Tensor | None) -> None:
        shares_KN = _shares(values_KN)
        above_KN = shares_KN * BLOCK > shares_KN.sum(1, keepdim=True)
        many_K1 = above_KN.sum(1, keepdim=True)
        for place, mine_KN, of_K1 in ((0, ~above_KN, BLOCK - many_K1), (2, above_KN, many_K1)):
            mean_K1 = (shares_KN * mine_KN).sum(1, keepdim=True) * (BLOCK / of_K1.clamp_min(1).to(shares_KN.dtype))
            payload_KB[:, place : place + 2] = bf16(mean_K1.float()).view(torch.uint8)
        codes_KN = above_KN.view(torch.uint8) * 2 | (values_KN < 0).view(torch.uint8)
        payload_KB[:, 4:] = pack(codes_KN, 2)

    def _read(self, payload_KB: Tensor, dtype: torch.dtype) -> Tensor:
        low_K1, high_K1 = read_as(payload_KB[:, :4], torch.bfloat16).to(dtype).split(1, 1)
        levels_K4 = torch.cat([low_K1, -low_K1, high_K1, -high_K1], 1)
        return levels_K4.gather(1, unpack(payload_KB[:, 4:], 2).long())


def _shares(values_KN: Tensor) -> Tensor:
    """|x| / 64, which add up to the block's mean without overflow."""
    return values_KN.abs().mul_(1 / BLOCK)
