"""Buckets: a fixed plan, handed over in order, whatever order gradients arrive in."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from shoal.parallel.buckets import Buckets


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), order=st.randoms(), unused=st.integers(0, 3))
def test_every_gradient_goes_out_once_in_the_order_of_the_plan(sizes, order, unused):
    parameters = [Parameter(torch.zeros(n, dtype=torch.float64)) for n in sizes]
    sent: list[torch.Tensor] = []
    buckets = Buckets(parameters, 160, lambda flat, _: sent.append(flat))
    used = list(range(len(parameters)))
    order.shuffle(used)
    used = used[: max(1, len(used) - unused)]
    for _ in range(2):  # the plan is the same in every step
        sent.clear()
        for p in parameters:
            p.grad = None
        with buckets.backwards(2):
            # The earlier micro-batch accumulates without sending.
            sum((parameters[i] * (i + 1)).sum() for i in used).backward()
            assert not sent
            for i in used:
                (parameters[i] * 10).sum().backward()
        assert [t.data_ptr() for t in sent] == [b.flat.data_ptr() for b in buckets.buckets]
        for i, p in enumerate(parameters):
            assert p.grad is not None
            expected = i + 1 + 10 if i in used else 0
            assert torch.equal(p.grad, torch.full_like(p, expected))
    assert sum(t.numel() for t in sent) == sum(sizes)
    assert all(b.flat.numel() * 8 <= 160 or len(b.parameters) == 1 for b in buckets.buckets)


def test_gradients_are_views_of_the_buckets_so_a_reduction_in_place_is_seen():
    parameters = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    buckets = Buckets(parameters, 1 << 20, lambda flat, _: flat.mul_(2))
    with buckets.backwards(1):
        (parameters[0].sum() + 3 * parameters[1].sum()).backward()
    assert parameters[0].grad.tolist() == [2.0] * 3
    assert parameters[1].grad.tolist() == [6.0] * 2
