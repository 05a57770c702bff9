"""Ulysses: an all-to-all gives each rank some heads of the whole row in place of all heads of some positions (Jacobs
et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509).

Rank r of n holds the r-th of n equal pieces of a row, so what arrives is the row once it is put in a row; heads are the
same work each, so causal order needs no balance. Where key heads are fewer than ranks, each goes to the n/K ranks whose
query heads share it, and their gradients are added up where it came from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.partial_attention import BlockMask, add_gradients_, attend_, nothing_seen


class Ulysses:
    """Attention of one micro-batch, for all layers. Every rank of the group makes it from the same documents."""

    def __init__(self, group: dist.ProcessGroup, document_BL: Tensor):
        """document_BL: integers, of the whole rows; n divides L."""
        self.group, self.ranks = group, group.size()
        self.mask = BlockMask(document_BL, document_BL.shape[1])

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        """out_BTHD for this rank's piece, from its own q, k and v of one dtype. All ranks call it together.

        n divides H, and either K, or K divides n.
        """
        return _UlyssesAttention.apply(q_BTHD, k_BTKD, v_BTKD, self)

    def to_heads(self, *pieces_BTHD: Tensor) -> list[Tensor]:
        """(B, L/n, n·h, D) each -> (B, L, h, D) each, h heads of the whole row, in one all-to-all."""
        by_rank = [x.unflatten(2, (self.ranks, -1)) for x in pieces_BTHD]
        arrived_NBThD = self._exchange(torch.cat(by_rank, 3).movedim(2, 0))
        rows_BLhD = arrived_NBThD.transpose(0, 1).flatten(1, 2)
        return list(rows_BLhD.split([x.shape[3] for x in by_rank], 2))

    def to_pieces(self, *rows_BLhD: Tensor) -> list[Tensor]:
        """The way back: (B, L, h, D) each -> (B, L/n, n·h, D) each."""
        arrived_NBThD = self._exchange(torch.cat(rows_BLhD, 2).unflatten(1, (self.ranks, -1)).transpose(0, 1))
        by_rank = arrived_NBThD.movedim(0, 2).split([x.shape[2] for x in rows_BLhD], 3)
        return [x.flatten(2, 3) for x in by_rank]

    def repeat(self, x_BTKD: Tensor) -> Tensor:
        """Key or value heads, each as often as there are ranks that need it, in the order of the ranks."""
        return x_BTKD.repeat_interleave(max(1, self.ranks // x_BTKD.shape[2]), 2)

    def add_up(self, x_BTMD: Tensor, heads: int) -> Tensor:
        """The gradient of `heads` heads from that of what `repeat` made of them."""
        return x_BTMD.unflatten(2, (heads, -1)).sum(3)

    def _exchange(self, sent_NX: Tensor) -> Tensor:
        """Piece i goes to rank i; piece i of the result came from rank i."""
        sent_NX = sent_NX.contiguous()
        arrived_NX = torch.empty_like(sent_NX)
        dist.all_to_all_single(arrived_NX, sent_NX, group=self.group)
        return arrived_NX


class _UlyssesAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, ulysses: Ulysses) -> Tensor:
        q_BLhD, k_BLhD, v_BLhD = ulysses.to_heads(q_BTHD, ulysses.repeat(k_BTKD), ulysses.repeat(v_BTKD))
        wide_BLhD, lse_BhL = result = nothing_seen(q_BLhD)
        attend_(result, q_BLhD, k_BLhD, v_BLhD, ulysses.mask, 0, 0)
        out_BLhD = wide_BLhD.to(q_BLhD.dtype)
        ctx.save_for_backward(q_BLhD, k_BLhD, v_BLhD, out_BLhD, lse_BhL)
        ctx.ulysses, ctx.key_heads = ulysses, k_BTKD.shape[2]
        return ulysses.to_pieces(out_BLhD)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        ulysses, heads = ctx.ulysses, ctx.key_heads
        q_BLhD, k_BLhD, v_BLhD, out_BLhD, lse_BhL = ctx.saved_tensors
        (of_out_BLhD,) = ulysses.to_heads(of_out_BTHD)
        qkv = q_BLhD, k_BLhD, v_BLhD
        of_q, of_k, of_v = (torch.zeros_like(x, dtype=lse_BhL.dtype) for x in qkv)
        add_gradients_((of_q, of_k, of_v), of_out_BLhD, qkv, (out_BLhD, lse_BhL), ulysses.mask, 0, 0)
        of_q, of_k, of_v = ulysses.to_pieces(*(x.to(out_BLhD.dtype) for x in (of_q, of_k, of_v)))
        return of_q, ulysses.add_up(of_k, heads), ulysses.add_up(of_v, heads), None
