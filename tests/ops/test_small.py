"""Norm, rotary positions and attention against formulas written out (bounds: 1e-12 in float64, 1e-6 in
float32)."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from shoal.ops.attention import causal_attend, document_attend
from shoal.ops.norm import rms_norm
from shoal.ops.rope import frequencies, rotate, rotation

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_norm(dtype: torch.dtype, bound: float) -> None:
    x_BD, weight_D = torch.randn(5, 7, dtype=dtype), torch.randn(7, dtype=dtype)
    ours = rms_norm(x_BD, weight_D, 1e-3)
    assert ours.dtype == dtype
    for row in range(5):
        root = math.sqrt(sum(v * v for v in x_BD[row].tolist()) / 7 + 1e-3)
        for i in range(7):
            assert abs(ours[row, i].item() - weight_D[i].item() * x_BD[row, i].item() / root) < bound * 10
    # Planted bug: without eps.
    assert (rms_norm(x_BD, weight_D, 0.0) - ours).abs().max() > 1e-5


def test_norm_of_large_bf16_does_not_overflow_and_takes_bf16_weights() -> None:
    x_D = torch.full((8,), 1e30, dtype=torch.bfloat16)
    assert rms_norm(x_D[:4] * 1e-12, torch.ones(4), 1e-5).isfinite().all()
    out = rms_norm(torch.randn(3, 8), torch.ones(8, dtype=torch.bfloat16), 1e-5, torch.bfloat16)
    assert out.dtype == torch.bfloat16


def test_rotation_turns_pairs_and_depends_on_differences_only() -> None:
    frequency = frequencies(6, 100.0, "", CPU)
    assert torch.allclose(frequency.double(), torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)]).double(), rtol=1e-6)
    x = torch.randn(1, 1, 1, 6, dtype=torch.float64)
    cos, sin = rotation(torch.tensor([[3]]), frequency, torch.float64)
    turned = rotate(x, cos, sin)[0, 0, 0]
    for i in range(3):
        pair = complex(x[0, 0, 0, i], x[0, 0, 0, i + 3]) * cmath.exp(3j * frequency[i].item())
        assert abs(turned[i].item() - pair.real) < 1e-12
        assert abs(turned[i + 3].item() - pair.imag) < 1e-12
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)

    def product(a: int, b: int) -> Tensor:
        places = [rotation(torch.tensor([[p]]), frequency, torch.float64) for p in (a, b)]
        return (rotate(q, *places[0]) * rotate(k, *places[1])).sum()

    assert abs(product(7, 4) - product(1003, 1000)) < 1e-12
    assert abs(product(7, 4) - product(7, 5)) > 1e-3


def test_rotation_of_bf16_is_rounded_once() -> None:
    x = torch.randn(1, 4, 2, 8).bfloat16()
    cos, sin = rotation(torch.arange(4)[None], frequencies(8, 1e4, "", CPU), torch.bfloat16)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


def naive(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """One query at a time."""
    out = torch.zeros_like(q)
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        shared = h // (q.shape[2] // k.shape[2])
        seen = [j for j in range(i + 1) if document[b, j] == document[b, i]]
        scores = [math.exp((q[b, i, h] @ k[b, j, shared]).item() / math.sqrt(q.shape[3])) for j in seen]
        out[b, i, h] = sum(s * v[b, j, shared] for s, j in zip(scores, seen, strict=True)) / sum(scores)
    return out


@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (3, 1), (2, 2)])
def test_attention(heads: int, shared: int) -> None:
    q = torch.randn(2, 6, heads, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 6, shared, 4, dtype=torch.float64)
    one, several = torch.zeros(2, 6), torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 5]])
    assert (causal_attend()(0)(q, k, v) - naive(q, k, v, one)).abs().max() < 1e-12
    assert (document_attend(several)(1)(q, k, v) - naive(q, k, v, several)).abs().max() < 1e-12
    # Planted bug: documents see each other.
    assert (document_attend(one)(1)(q, k, v) - naive(q, k, v, several)).abs().max() > 1e-3


def test_long_rows_of_one_document_need_no_mask() -> None:
    length = 520
    q, k, v = torch.randn(3, 2, length, 1, 4, dtype=torch.float64)
    single = torch.tensor([[3], [4]]).expand(2, length)
    attention = document_attend(single)(0)
    assert attention is causal_attend()(0)
    almost = single.clone()
    almost[1, -1] = 5
    assert document_attend(almost)(0) is not attention
    assert (document_attend(almost)(0)(q, k, v)[0] - attention(q, k, v)[0]).abs().max() < 1e-12
