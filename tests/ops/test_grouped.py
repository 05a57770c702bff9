"""Grouped products against a plain loop over rows in float64, within 1e-12; and what moves rows there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.ops import grouped
from shoal.ops.grouped import count, gather, grouped_gated, grouped_linear, order, spread
from tests.numbers import largest

BOUND = 1e-12


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item() if b.numel() else 0.0


def problem(counts: list[int], behind: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    x_MI = torch.randn(sum(counts) + behind, 8, dtype=dtype, generator=generator)
    weight_EOI = torch.randn(len(counts), 16, 8, dtype=dtype, generator=generator)
    return x_MI.requires_grad_(), weight_EOI.requires_grad_(), torch.tensor(counts)


def by_row(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """One vector at a time."""
    groups = [group for group, size in enumerate(counts_E.tolist()) for _ in range(size)]
    rows = [weight_EOI[group] @ x_MI[row] for row, group in enumerate(groups)]
    rows += [weight_EOI.new_zeros(weight_EOI.shape[1])] * (len(x_MI) - len(groups))
    out_MO = torch.stack(rows) if rows else x_MI.new_zeros(0, weight_EOI.shape[1])
    return out_MO + 0.0 * (x_MI.sum() + weight_EOI.sum())  # so that there is always a gradient to ask for


def gated(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Both matrices of a gated product in one: the upper half of the outputs is the gate."""
    return grouped_gated(x_MI, *weight_EOI.chunk(2, 1), counts_E)


def gated_by_row(x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    gate_MO, up_MO = by_row(x_MI, weight_EOI, counts_E).chunk(2, 1)
    return F.silu(gate_MO) * up_MO


ORACLES: dict[Callable[..., Tensor], Callable[..., Tensor]] = {grouped_linear: by_row, gated: gated_by_row}


def furthest(
    product: Callable[..., Tensor], counts: list[int], behind: int, dtype: torch.dtype = torch.float64
) -> float:
    """Distance from the oracle of the product and of both gradients, whichever is largest."""
    results = []
    for way in (product, ORACLES[product]):
        x_MI, weight_EOI, counts_E = problem(counts, behind, dtype)
        out_MO = way(x_MI, weight_EOI, counts_E)
        (out_MO * torch.arange(1.0, out_MO.numel() + 1, dtype=dtype).view_as(out_MO).sin()).sum().backward()
        results.append((out_MO, x_MI.grad, weight_EOI.grad))
    return largest(distance(ours, theirs) for ours, theirs in zip(*results, strict=True))


@settings(deadline=None, max_examples=40)
@given(
    product=st.sampled_from(list(ORACLES)),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    behind=st.integers(0, 3),
)
def test_equals_a_loop_over_rows(product: Callable[..., Tensor], counts: list[int], behind: int) -> None:
    assert furthest(product, counts, behind) < BOUND


@pytest.mark.parametrize("product", ORACLES)
@pytest.mark.parametrize("counts", [[4, 0, 3], [0, 0, 5, 1]])
def test_kernel_for_all_groups_equals_a_loop_over_rows(
    product: Callable[..., Tensor], counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own, chosen on GPUs only, made to run here; it has no float64."""
    monkeypatch.setattr(grouped, "_has_kernel", lambda weight: True)
    assert furthest(product, counts, 2, torch.float32) < 1e-6


@pytest.mark.parametrize("product", ORACLES)
def test_sizes_on_the_host_are_the_counts(product: Callable[..., Tensor]) -> None:
    """With them nobody asks the device: whatever `counts_E` says is not read."""
    x_MI, weight_EOI, counts_E = problem([2, 0, 3], behind=1)
    way, *weights = (grouped_gated, *weight_EOI.chunk(2, 1)) if product is gated else (grouped_linear, weight_EOI)
    ours = way(x_MI, *weights, torch.zeros_like(counts_E), [2, 0, 3])
    gradients = torch.autograd.grad(ours.sin().sum(), (x_MI, weight_EOI))
    theirs = ORACLES[product](x_MI, weight_EOI, counts_E)
    assert distance(ours, theirs) < BOUND
    for a, b in zip(gradients, torch.autograd.grad(theirs.sin().sum(), (x_MI, weight_EOI)), strict=True):
        assert distance(a, b) < BOUND


@pytest.mark.parametrize("product", ORACLES)
def test_gradcheck(product: Callable[..., Tensor]) -> None:
    x_MI, weight_EOI, counts_E = problem([2, 0, 3], behind=1)
    assert torch.autograd.gradcheck(lambda x, w: product(x, w, counts_E), (x_MI, weight_EOI))


def test_autocast_decides_the_dtype() -> None:
    x_MI, weight_EOI, counts_E = problem([2, 3], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out_MO = grouped_linear(x_MI, weight_EOI, counts_E)
    out_MO.float().sum().backward()
    assert out_MO.dtype == torch.bfloat16
    assert torch.equal(out_MO, grouped_linear(x_MI.bfloat16(), weight_EOI.bfloat16(), counts_E))
    assert x_MI.grad is not None
    assert x_MI.grad.dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(data=st.data(), rows=st.integers(1, 6), choices=st.integers(1, 3), groups=st.integers(3, 5))
def test_there_and_back(data: st.DataObject, rows: int, choices: int, groups: int) -> None:
    """Rows times 1 + their group, weighted and summed, against the same without any sorting; and gradients."""
    group = st.lists(st.integers(0, groups), min_size=choices, max_size=choices, unique=True)
    index_NK = torch.tensor(data.draw(st.lists(group, min_size=rows, max_size=rows)))
    generator = torch.Generator().manual_seed(rows)
    x_ND = torch.randn(rows, 4, dtype=torch.float64, generator=generator).requires_grad_()
    weight_NK = torch.rand(rows, choices, dtype=torch.float64, generator=generator).requires_grad_()
    by_group = order(index_NK, groups)
    assert by_group.counts_E.tolist() == [(index_NK == group).sum().item() for group in range(groups)]
    sorted_M = index_NK.flatten()[by_group.sorted_M]
    assert torch.equal(sorted_M, index_NK.flatten().sort().values)
    ours = gather(spread(x_ND, by_group) * (1 + sorted_M[:, None]), weight_NK, by_group)
    plain = x_ND * ((1 + index_NK) * weight_NK).sum(1, keepdim=True)
    assert distance(ours, plain) < BOUND
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), (x_ND, weight_NK)) for y in (ours, plain)), strict=True):
        assert distance(a, b) < BOUND


def test_rows_keep_their_order_within_a_group() -> None:
    by_group = order(torch.tensor([[1, 0], [0, 2], [1, 0]]), 3)
    assert (by_group.sorted_M // 2).tolist() == [0, 1, 2, 0, 2, 1]


def test_gradcheck_there_and_back() -> None:
    by_group = order(torch.tensor([[1, 0], [2, 3], [1, 2]]), 3)
    x_ND = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight_NK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: gather(spread(x, by_group) ** 2, w, by_group), (x_ND, weight_NK))


def test_counts_pass_over_what_is_in_no_group() -> None:
    assert count(torch.tensor([[0, 4], [2, 3], [2, 9]]), 3).tolist() == [1, 0, 2]


def _empty_groups_forgotten(weight_EOI: Tensor, counts_E: Tensor, sizes: Sequence[int] | None) -> list[slice]:
    counts = [size for size in counts_E.tolist() if size] + [0] * int((counts_E == 0).sum())
    return [slice(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]


def _stops_at_the_last_group(
    a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor, rows: list[slice], sum_MN: Tensor | None = None
) -> Tensor:
    out_MN = torch.full((a_MK.shape[0], b_EKN.shape[2]), 7.0, dtype=a_MK.dtype)
    for group, b_KN in zip(rows, b_EKN, strict=True):
        out_MN[group] = a_MK[group] @ b_KN
    return out_MN


@pytest.mark.parametrize(("part", "bug"), [("_rows", _empty_groups_forgotten), ("_times", _stops_at_the_last_group)])
def test_sees_planted_bug(part: str, bug: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, part, bug)
    assert furthest(grouped_linear, [2, 0, 3], 1) > 1e-3
