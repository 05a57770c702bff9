"""Dropout of attention's probabilities: the mask of its definition, attention and gradients those of the formula."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from shoal.ops.attention import Attention, document_attend, dropped_attend
from shoal.ops.dropout import Dropout
from tests.ops.test_dropout import expected, index, made, whole

B, L, H, K, D, V = 3, 12, 4, 2, 6, 5
DOCUMENT_BL = torch.tensor([[0] * 5 + [1] * 7, [4] * 12, [0] * 1 + [1] * 3 + [2] * 8])


def kept(drop: Dropout, layer: int = 0, first_head: int = 0, heads: int = H, keys: int = L) -> Tensor:
    """(B, heads, L, keys): what a probability is multiplied by."""
    ones_BHLS = torch.ones(len(drop.row_BL), heads, drop.row_BL.shape[1], keys, dtype=torch.float64)
    return drop.of_probabilities(layer, first_head)(ones_BHLS)


def qkv(heads: int = H, keys: int = K, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, L, heads, D), (B, L, keys, D), (B, L, keys, V))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def formula(q_BLHD: Tensor, k_BSKD: Tensor, v_BSKV: Tensor, scale_BHLS: Tensor) -> Tensor:
    """Query by query, in torch's own operations."""
    share, out = q_BLHD.shape[2] // k_BSKD.shape[2], []
    for row in range(B):
        for head in range(q_BLHD.shape[2]):
            for place in range(L):
                seen = [s for s in range(place + 1) if DOCUMENT_BL[row, s] == DOCUMENT_BL[row, place]]
                k_SD, v_SV = k_BSKD[row, seen, head // share], v_BSKV[row, seen, head // share]
                p_S = (k_SD @ q_BLHD[row, place, head] / D**0.5).softmax(0)
                out.append((p_S * scale_BHLS[row, head, place, seen]) @ v_SV)
    return torch.stack(out).view(B, -1, L, V).transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(
    whole, index, index, st.integers(0, 2**31), st.integers(0, 200), st.integers(0, 500), st.sampled_from((0.1, 0.6))
)
def test_every_probability_is_as_defined(seed, step, sample, place, layer, head, rate) -> None:
    """By (seed, step, sample, place of query, layer, site -1, head), then place of key; kept ones are scaled."""
    drop = Dropout(rate, seed, step, torch.tensor([sample]), torch.tensor([place]))
    found = kept(drop, layer, head, heads=2, keys=20)[0, :, 0]
    for number in range(2):
        right = [expected(rate, (seed, step, sample, place, layer, -1, head + number), key) for key in range(20)]
        assert (found[number] != 0).tolist() == right
    scale = 1 / (1 - rate)
    assert all(abs(value - scale) < 1e-9 * scale for value in found[found != 0].tolist())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_and_mean(rate: float) -> None:
    """Of 2.1 million: within 5 standard errors of the rate, and of a mean of 1."""
    found = kept(made(rate, batch=4, length=256), heads=8, keys=256)
    error = (rate * (1 - rate) / found.numel()) ** 0.5
    assert abs((found == 0).double().mean().item() - rate) < 5 * error
    assert abs(found.double().mean().item() - 1) < 5 * error / (1 - rate)


def test_no_query_head_or_key_is_dropped_more() -> None:
    rate, found = 0.3, (kept(made(0.3, batch=4, length=128), heads=8, keys=128) == 0).double()
    for dimension in range(4):
        others = [d for d in range(4) if d != dimension]
        shares = found.mean(others)
        error = (rate * (1 - rate) * shares.numel() / found.numel()) ** 0.5
        assert (shares - rate).abs().max() < 5 * error


def test_heads_layers_and_steps_are_independent() -> None:
    def mask(step: int = 0, layer: int = 0, head: int = 0) -> Tensor:
        return (kept(made(0.5, step=step, batch=4, length=256), layer, head, 1, 256) == 0).double() * 2 - 1

    one = mask()
    for other in (mask(step=1), mask(layer=1), mask(head=1), mask(head=64)):
        assert abs((one * other).mean().item()) < 5 / one.numel() ** 0.5
    # Nor is it the residual stream's, of whatever site.
    for site in range(3):
        residual = (made(0.5, batch=4, length=256)(torch.ones(4, 256, 256), 0, site) == 0).double() * 2 - 1
        assert abs((one[:, 0] * residual).mean().item()) < 5 / one.numel() ** 0.5


def test_a_rank_has_the_slice_of_the_whole() -> None:
    """Some samples, some places of queries, some heads."""
    all_ = kept(made(0.4, batch=5, length=L), 2, 0, heads=8)
    part = Dropout(0.4, 0, 0, torch.tensor([3, 1]) * 1_000_003, torch.tensor([7, 2, 3]))
    assert torch.equal(kept(part, 2, 4, heads=3), all_[[3, 1], 4:7][:, :, [7, 2, 3]])


@pytest.mark.parametrize(("heads", "keys"), [(4, 2), (4, 4), (3, 1)])
def test_attention_and_gradients_are_the_formulas(heads: int, keys: int) -> None:
    """With packed documents, shared key heads, values narrower than keys. Float64, within 1e-12."""
    drop = made(0.4, seed=3, batch=B, length=L)
    found = []
    for attention in (
        dropped_attend(DOCUMENT_BL, drop, 8)(5),
        lambda *three: formula(*three, kept(drop, 5, 8, heads)),
    ):
        leaves = [x.requires_grad_() for x in qkv(heads, keys)]
        out = attention(*leaves)
        out.sin().sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    for ours, right in zip(*found, strict=True):
        assert (ours - right).norm() <= 1e-12 * right.norm()
    # Planted bug: heads counted from 0.
    wrong = dropped_attend(DOCUMENT_BL, drop)(5)(*qkv(heads, keys))
    assert (wrong - found[1][0]).norm() > 0.1 * found[1][0].norm()


def test_gradient_by_finite_differences() -> None:
    attention = dropped_attend(DOCUMENT_BL[:1, 3:8], made(0.3, batch=1, length=5))(1)
    assert torch.autograd.gradcheck(attention, [x[:1, :5].requires_grad_() for x in qkv()])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_without_dropout_it_is_the_fused_attention(dtype: torch.dtype, bound: float) -> None:
    drop = Dropout(0.0, 0, 0, torch.arange(B), torch.arange(L))
    q, k, v = qkv(dtype=dtype)
    v = torch.cat((v, v[..., :1]), -1)  # the kernel for bf16 wants equal widths
    ours, fused = dropped_attend(DOCUMENT_BL, drop)(0)(q, k, v), document_attend(DOCUMENT_BL)(0)(q, k, v)
    assert ours.dtype == fused.dtype == dtype
    assert ours.shape == fused.shape
    assert (ours - fused).double().norm() <= bound * fused.double().norm()


def test_autocast_is_that_of_the_fused_attention() -> None:
    """Products in bf16, scores in float32: nearer to float32's than rounding scores to bf16 would be."""
    drop = Dropout(0.0, 0, 0, torch.arange(B), torch.arange(L))
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, fused = dropped_attend(DOCUMENT_BL, drop)(0)(8 * q, k, v), document_attend(DOCUMENT_BL)(0)(8 * q, k, v)
    assert ours.dtype == fused.dtype == torch.bfloat16
    exact = dropped_attend(DOCUMENT_BL, drop)(0)(*(x.bfloat16().double() for x in (8 * q, k, v)))
    for out in (ours, fused):
        assert (out.double() - exact).norm() <= 3e-3 * exact.norm()


def test_recomputation_makes_the_same_mask() -> None:
    gradients = []
    attention = dropped_attend(DOCUMENT_BL, made(0.3, batch=B, length=L))(1)
    for recompute in (False, True):
        leaves = [x.requires_grad_() for x in qkv()]
        again = {"use_reentrant": False, "preserve_rng_state": False}
        out = checkpoint(attention, *leaves, **again) if recompute else attention(*leaves)
        out.sin().sum().backward()
        gradients.append([x.grad for x in leaves])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.nightly
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU"
)
def test_one_graph_for_all_layers_steps_and_micro_batches() -> None:
    torch._dynamo.reset()
    counters.clear()

    def block(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v) + q[..., :V]

    compiled: Callable[..., Tensor] = torch.compile(block)
    for step in range(2):
        for layer in range(3):
            drop = made(0.5, step=step, batch=B, length=L)
            attention = dropped_attend(DOCUMENT_BL.roll(step, 0), drop, 4)(layer)
            results = []
            for function in (compiled, block):
                leaves = [x.requires_grad_() for x in qkv()]
                out = function(attention, *leaves)
                out.sin().sum().backward()
                results.append([out, *(x.grad for x in leaves)])
            assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*results, strict=True))
    assert counters["stats"]["unique_graphs"] == 1
