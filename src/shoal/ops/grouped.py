"""Rows sorted into groups, and products of each group with a matrix of its own: what experts compute.

Sorting costs two copies of the rows and no padding, whatever the sizes of the groups (Gale et al. 2022, "MegaBlocks",
section 5, arXiv:2211.15841). Both are written as permutations, forward and backward: nothing adds to the same place
twice, so results do not depend on the order in which threads get there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Rows = list[slice] | None
"""Where each group's rows are; None where one kernel takes all groups and asks nobody."""


@dataclass(frozen=True)
class Order:
    """The M = N · K choices of N rows, sorted by group, in the order of the rows within each.

    sorted_M: which choice stands at each place. place_M: where each choice stands. counts_E: choices of each group;
    those of none stand behind them all. choices: K.
    """

    sorted_M: Tensor
    place_M: Tensor
    counts_E: Tensor
    choices: int


def order(index_NK: Tensor, groups: int) -> Order:
    """index_NK: int64, the groups that each row goes to, from 0; `groups` = to none."""
    flat_M = index_NK.reshape(-1)
    sorted_M = flat_M.argsort(stable=True)
    place_M = torch.empty_like(sorted_M)
    place_M[sorted_M] = torch.arange(len(flat_M), device=flat_M.device)
    counts_E = count(flat_M, groups)
    return Order(sorted_M, place_M, counts_E, index_NK.shape[1])


def count(index: Tensor, groups: int) -> Tensor:
    """How often each number below `groups` is in `index`, int64, (groups,); larger ones are passed over."""
    # Not bincount, which on a GPU waits for the largest number.
    counts = torch.zeros(groups + 1, dtype=torch.int64, device=index.device)
    flat = index.reshape(-1).clamp(max=groups)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:groups]


def spread(x_ND: Tensor, order: Order) -> Tensor:
    """Every row once for each of its choices, in `order`: (M, D)."""
    return _Spread.apply(x_ND, order)


def gather(rows_MD: Tensor, weight_NK: Tensor, order: Order) -> Tensor:
    """The weighted sum of each row's choices, (N, D), in the dtype of `rows_MD`."""
    return _Gather.apply(rows_MD, weight_NK, order)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.place_M)
        ctx.choices = order.choices
        return x_ND.index_select(0, order.sorted_M // order.choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MD: Tensor) -> tuple[Tensor, None]:
        (place_M,) = ctx.saved_tensors
        # One choice after the other: less to write and read again than all at once.
        first_N, *others = place_M.view(-1, ctx.choices).unbind(1)
        sum_ND = gradient_MD.index_select(0, first_N)
        for other_N in others:
            sum_ND += gradient_MD.index_select(0, other_N)
        return sum_ND, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weight_NK: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(rows_MD, weight_NK, order.sorted_M, order.place_M)
        chosen_NKD = rows_MD.index_select(0, order.place_M).unflatten(0, weight_NK.shape)
        return torch.einsum("nkd,nk->nd", chosen_NKD, weight_NK.to(rows_MD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_MD, weight_NK, sorted_M, place_M = ctx.saved_tensors
        of_rows_MD = gradient_ND.index_select(0, sorted_M // weight_NK.shape[1])
        of_rows_MD *= weight_NK.flatten().index_select(0, sorted_M)[:, None].to(of_rows_MD.dtype)
        chosen_NKD = rows_MD.index_select(0, place_M).unflatten(0, weight_NK.shape)
        of_weight_NK = torch.einsum("nkd,nd->nk", chosen_NKD, gradient_ND)
        return of_rows_MD, of_weight_NK.to(weight_NK.dtype), None


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """x · weightᵀ (M, O), where each group's rows meet its own matrix; rows behind all groups give zeros.

    x_MI: rows by group, in autocast's dtype if it is on, else their own; so are the products. weight_EOI: any float
    dtype. counts_E: int64, the groups' rows, in all at most M. sizes: the same numbers, where the host has them; else a
    product that is no single kernel waits for the device to tell them, once.
    """
    x_MI, weight_EOI = _cast(x_MI, weight_EOI)
    return _GroupedLinear.apply(x_MI, weight_EOI, counts_E, _rows(weight_EOI, counts_E, sizes))


def grouped_gated(
    x_MI: Tensor, gate_EOI: Tensor, up_EOI: Tensor, counts_E: Tensor, sizes: Sequence[int] | None = None
) -> Tensor:
    """silu(x · gateᵀ) ⊙ (x · upᵀ), (M, O), otherwise as `grouped_linear`. Keeps the two products for backward, and
    nothing else of their size."""
    x_MI, gate_EOI, up_EOI = _cast(x_MI, gate_EOI, up_EOI)
    return _GroupedGated.apply(x_MI, gate_EOI, up_EOI, counts_E, _rows(gate_EOI, counts_E, sizes))


def _cast(x_MI: Tensor, *weights_EOI: Tensor) -> tuple[Tensor, ...]:
    kind = x_MI.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_MI.dtype
    return tuple(t.to(dtype) for t in (x_MI, *weights_EOI))


def _rows(weight_EOI: Tensor, counts_E: Tensor, sizes: Sequence[int] | None) -> Rows:
    if _has_kernel(weight_EOI):
        return None
    sizes = counts_E.tolist() if sizes is None else sizes
    return [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]


def _has_kernel(weight_EOI: Tensor) -> bool:
    """Whether PyTorch has one kernel for all groups. On CPU it loops too (no faster in bf16, slower in float32)."""
    aligned = all(size % 8 == 0 for size in weight_EOI.shape[1:])
    return weight_EOI.is_cuda and weight_EOI.dtype in (torch.bfloat16, torch.float16) and aligned


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(x_MI, weight_EOI, counts_E)
        ctx.rows = rows
        return _times(x_MI, weight_EOI.transpose(1, 2), counts_E, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_MI, weight_EOI, counts_E = ctx.saved_tensors
        gradient_MO = gradient_MO.contiguous()
        of_x_MI = _times(gradient_MO, weight_EOI, counts_E, ctx.rows)
        return of_x_MI, _outer(gradient_MO, x_MI, counts_E, ctx.rows), None, None


class _GroupedGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, gate_EOI: Tensor, up_EOI: Tensor, counts_E: Tensor, rows: Rows) -> Tensor:
        gate_MO = _times(x_MI, gate_EOI.transpose(1, 2), counts_E, rows)
        up_MO = _times(x_MI, up_EOI.transpose(1, 2), counts_E, rows)
        ctx.save_for_backward(x_MI, gate_EOI, up_EOI, gate_MO, up_MO, counts_E)
        ctx.rows = rows
        return F.silu(gate_MO).mul_(up_MO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, gate_EOI, up_EOI, gate_MO, up_MO, counts_E = ctx.saved_tensors
        of_up_MO = F.silu(gate_MO).mul_(gradient_MO)
        of_gate_MO = torch.ops.aten.silu_backward(gradient_MO * up_MO, gate_MO)
        of_x_MI = _times(of_gate_MO, gate_EOI, counts_E, ctx.rows)
        of_x_MI = _times(of_up_MO, up_EOI, counts_E, ctx.rows, of_x_MI)
        of_gate_EOI = _outer(of_gate_MO, x_MI, counts_E, ctx.rows)
        return of_x_MI, of_gate_EOI, _outer(of_up_MO, x_MI, counts_E, ctx.rows), None, None


def _times(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor, rows: Rows, sum_MN: Tensor | None = None) -> Tensor:
    """Each group's a b, zeros behind them all; added to `sum_MN` in place, if there is one."""
    if rows is None:
        product_MN = _times_by_kernel(a_MK, b_EKN, counts_E)
        return product_MN if sum_MN is None else sum_MN.add_(product_MN)
    out_MN = a_MK.new_empty(a_MK.shape[0], b_EKN.shape[2]) if sum_MN is None else sum_MN
    for group, b_KN in zip(rows, b_EKN, strict=True):
        if sum_MN is None:
            torch.mm(a_MK[group], b_KN, out=out_MN[group])
        else:
            torch.addmm(out_MN[group], a_MK[group], b_KN, out=out_MN[group])
    out_MN[rows[-1].stop :].zero_()
    return out_MN


def _outer(a_MN: Tensor, b_MK: Tensor, counts_E: Tensor, rows: Rows) -> Tensor:
    """Each group's aᵀ b, (E, N, K); zeros where a group has no rows."""
    if rows is None:
        return F.grouped_mm(a_MN.T, b_MK, offs=counts_E.cumsum(0, dtype=torch.int32))
    out_ENK = a_MN.new_empty(len(counts_E), a_MN.shape[1], b_MK.shape[1])
    for group, out_NK in zip(rows, out_ENK, strict=True):
        torch.mm(a_MN[group].T, b_MK[group], out=out_NK)
    return out_ENK


def _times_by_kernel(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    out_MN = F.grouped_mm(a_MK, b_EKN, offs=ends_E)
    behind_M = torch.arange(len(out_MN), device=out_MN.device) >= ends_E[-1]
    return out_MN.masked_fill_(behind_M[:, None], 0.0)
