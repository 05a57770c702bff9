"""Matrix products of tensor parallelism while the sequence is on its way (`tensor_by=ring`).

Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models"
(ASPLOS, section 5): instead of gathering the sequence and then multiplying it, each part is multiplied as it comes
round the ring of ranks while the next one arrives; instead of multiplying and then scattering the sum, the sum of each
part goes round, and every rank adds its product to it. As many bytes are sent as by the collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.operations import noted


@torch.compiler.disable
def gathered_linear(x_BlD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """linear(x of all ranks, one after the other along dimension 1): (B, L, F)."""
    x_BlD, weight_FD, bias_F = _cast(x_BlD, weight_FD, bias_F)
    y_BLF: Tensor = _GatheredLinear.apply(x_BlD, weight_FD, group)
    return y_BLF if bias_F is None else y_BLF + bias_F


@torch.compiler.disable
def linear_scattered(x_BLF: Tensor, weight_DF: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of linear(x), of which each keeps its part along dimension 1: (B, l, D)."""
    x_BLF, weight_DF, _ = _cast(x_BLF, weight_DF, None)
    y_BlD: Tensor = _LinearScattered.apply(x_BLF, weight_DF, group)
    return y_BlD


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast would, once for all parts."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BlD: Tensor, weight_FD: Tensor, group: dist.ProcessGroup) -> Tensor:
        y_NBlF = x_BlD.new_empty(group.size(), *x_BlD.shape[:2], len(weight_FD))
        x_NBlD = _gather(x_BlD, group, lambda rank, x: y_NBlF[rank].copy_(F.linear(x, weight_FD)))
        ctx.save_for_backward(x_NBlD, weight_FD)
        ctx.group = group
        return _whole(y_NBlF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y_BLF: Tensor) -> tuple[Tensor | None, ...]:
        x_NBlD, weight_FD = ctx.saved_tensors
        of_y_BlF, of_x_BlD, of_weight_FD = of_y_BLF.chunk(len(x_NBlD), 1), None, None
        if ctx.needs_input_grad[0]:
            of_x_BlD = _scatter(lambda rank: of_y_BlF[rank] @ weight_FD, ctx.group)
        if ctx.needs_input_grad[1]:
            of_weight_FD = of_y_BLF.flatten(0, 1).T @ _whole(x_NBlD).flatten(0, 1)
        return of_x_BlD, of_weight_FD, None


class _LinearScattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLF: Tensor, weight_DF: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x_BLF, weight_DF)
        ctx.group = group
        x_BlF = x_BLF.chunk(group.size(), 1)
        return _scatter(lambda rank: F.linear(x_BlF[rank], weight_DF), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y_BlD: Tensor) -> tuple[Tensor | None, ...]:
        x_BLF, weight_DF = ctx.saved_tensors
        of_x_BLF = torch.empty_like(x_BLF) if ctx.needs_input_grad[0] else None
        of_x_BlF = None if of_x_BLF is None else of_x_BLF.chunk(ctx.group.size(), 1)

        def use(rank: int, of_y: Tensor) -> None:
            if of_x_BlF is not None:
                of_x_BlF[rank].copy_(of_y @ weight_DF)

        of_y_BLD, of_weight_DF = _whole(_gather(of_y_BlD, ctx.group, use)), None
        if ctx.needs_input_grad[1]:
            of_weight_DF = of_y_BLD.flatten(0, 1).T @ x_BLF.flatten(0, 1)
        return of_x_BLF, of_weight_DF, None


def _whole(parts_NBlX: Tensor) -> Tensor:
    return parts_NBlX.transpose(0, 1).flatten(1, 2)


def _gather(x: Tensor, group: dist.ProcessGroup, use: Callable[[int, Tensor], object]) -> Tensor:
    """All ranks' x, stacked. use: called with each rank and its x while the next one arrives."""
    ranks, rank = group.size(), group.rank()
    parts = x.new_empty(ranks, *x.shape)
    parts[rank] = x
    for step in range(ranks):
        here, next_ = (rank - step) % ranks, (rank - step - 1) % ranks
        works = _pass_on(parts[here], parts[next_], group) if step < ranks - 1 else []
        use(here, parts[here])
        _wait(works)
    return parts


def _scatter(make: Callable[[int], Tensor], group: dist.ProcessGroup) -> Tensor:
    """Of what the ranks make for this one, the sum. make: called with each rank while the sum for it so far arrives."""
    ranks, rank = group.size(), group.rank()
    works: list[dist.Work] = []
    arrived: Tensor | None = None
    for step in range(ranks):
        made = make((rank - step - 1) % ranks).contiguous()
        _wait(works)
        total = made if arrived is None else made.add_(arrived)
        if step < ranks - 1:
            arrived = torch.empty_like(total)
            works = _pass_on(total, arrived, group)
    return total


def _pass_on(sent: Tensor, received: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    """To the next rank of the ring, and from the one before."""
    ranks, rank = group.size(), group.rank()
    send = dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % ranks)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % ranks)
    return [*dist.batch_isend_irecv(noted([send, receive]))]


def _wait(works: list[dist.Work]) -> None:
    while works:
        work = works.pop(0)
        work.wait()
