"""Partial attention against a softmax over the whole row in float64 (bound 1e-12), in any chunks, tiles and order."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.ops import partial_attention as parts
from shoal.ops.partial_attention import BlockMask

KERNELS = ["fused", "plain"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are tiny, and two threads wait for each other wherever cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch) -> str:
    choose(request.param, monkeypatch)
    return request.param


def choose(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plain` is what other devices run; on a CPU it must be asked for."""
    if kernel == "plain":
        monkeypatch.setattr(parts, "_fused", parts._plain)
        monkeypatch.setattr(parts, "_fused_gradients", parts._plain_gradients)


def inputs(rows: int, length: int, heads: int, key_heads: int, seed: int = 0, width: int = 5) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, n, width) for n in (heads, key_heads, key_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def plain_softmax(tensors: list[Tensor], document_BL: Tensor) -> list[Tensor]:
    """out and the gradients of q, k, v, by autograd through the definition."""
    *qkv, of_out = [x.double() for x in tensors]
    q, k, v = qkv = [x.requires_grad_() for x in qkv]
    share = q.shape[2] // k.shape[2]
    score = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(share, 2)) / q.shape[-1] ** 0.5
    seen_BLL = (document_BL[:, :, None] == document_BL[:, None]).tril()
    p = score.masked_fill(~seen_BLL[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(share, 2))
    return [out.detach(), *torch.autograd.grad(out, qkv, of_out)]


def by_parts(tensors: list[Tensor], mask: BlockMask, order: random.Random | None = None) -> list[Tensor]:
    """The same by chunks, in any order; sums wide."""
    q, k, v, of_out = tensors
    at = [slice(start, start + mask.chunk) for start in range(0, q.shape[1], mask.chunk)]
    pairs = [(i, j) for i in range(len(at)) for j in range(len(at)) if mask.sees(i, j)]
    if order:
        order.shuffle(pairs)
    wide_out, lse = so_far = parts.nothing_seen(q)
    for i, j in pairs:
        parts.attend_(parts.rows(so_far, at[i]), q[:, at[i]], k[:, at[j]], v[:, at[j]], mask, i, j)
    out = wide_out.to(q.dtype)
    of_q, of_k, of_v = sums = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
    for i, j in pairs:
        here, there = at[i], at[j]
        parts.add_gradients_(
            (of_q[:, here], of_k[:, there], of_v[:, there]), of_out[:, here], (q[:, here], k[:, there], v[:, there]),
            parts.rows((out, lse), here), mask, i, j,
        )  # fmt: skip
    return [out, *sums]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert all(torch.isfinite(x).all() for x in ours)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    tiles=st.tuples(st.integers(1, 7), st.integers(1, 3)),
    documents=st.data(),
    order=st.randoms(use_true_random=False),
)
def test_equals_a_softmax_over_the_row(kernel, shape, heads, tiles, documents, order) -> None:
    """Also for documents that come back later in the row: equal numbers see each other."""
    rows, chunks, chunk = shape
    tensors = inputs(rows, chunks * chunk, heads[0] * heads[1], heads[0])
    numbers = st.lists(st.integers(0, 2), min_size=chunks * chunk, max_size=chunks * chunk)
    document_BL = torch.tensor([documents.draw(numbers) for _ in range(rows)])
    if documents.draw(st.booleans()):
        document_BL = document_BL.cummax(1).values
    with pytest.MonkeyPatch.context() as patch:
        choose(kernel, patch)
        patch.setattr(parts, "_TILE", tiles[0])
        patch.setattr(parts, "_WIDE_TILE", tiles[0] * tiles[1])
        ours = by_parts(tensors, BlockMask(document_BL, chunk), order)
    assert distance(ours, plain_softmax(tensors, document_BL)) < 1e-12


def test_large_scores_neither_overflow_nor_vanish(kernel, monkeypatch) -> None:
    """Scores of ±1e4: exponentials of them are inf or 0 unless each part's largest is taken off. The bound is 1e4 times
    as wide: so is a score's own rounding."""
    monkeypatch.setattr(parts, "_TILE", 4)
    tensors = inputs(1, 24, 2, 2)
    tensors[0] *= 1e4
    document_BL = torch.arange(24)[None] // 10
    assert distance(by_parts(tensors, BlockMask(document_BL, 6)), plain_softmax(tensors, document_BL)) < 1e-8


def test_a_part_that_some_queries_do_not_see(kernel) -> None:
    """Its result for them is 0 with lse −inf, and merging it changes nothing, in either order."""
    q, k, v, _ = inputs(1, 4, 2, 1)
    visible_BTS = torch.tensor([[[True, False], [False, False], [True, True], [False, False]]])
    out, lse = parts._fused(q, k[:, :2], v[:, :2], visible_BTS, False)
    assert lse.isinf().sum(-1).tolist() == [[2, 2]]
    assert not out[:, [1, 3]].any()
    for first in (True, False):
        result, other = parts.nothing_seen(q), parts._fused(q, k, v, None, False)
        for part in [other, (out, lse)] if first else [(out, lse), other]:
            parts.merge_(result, part)
        assert torch.allclose(result[0][:, [1, 3]], other[0][:, [1, 3]], rtol=1e-14)
        assert torch.equal(result[1][:, :, [1, 3]], other[1][:, :, [1, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_plain_attention(kernel, dtype, monkeypatch) -> None:
    """From float64 by norm, at most 1.5 times as far as torch's own attention in the same dtype (in fp32 both are
    within 1e-6). Plain matrix products round the scores to bf16 too: 3 times."""
    monkeypatch.setattr(parts, "_TILE", 32)
    document_BL = (torch.arange(256)[None] >= torch.tensor([[100], [170]])).int()
    tensors = [x.to(dtype) for x in inputs(2, 256, 4, 2, width=32)]
    truth = plain_softmax(tensors, document_BL)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in tensors[:3])
    seen = (document_BL[:, :, None] == document_BL[:, None]).tril()[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    theirs = [x.transpose(1, 2) for x in (out, *torch.autograd.grad(out, (q, k, v), tensors[3].transpose(1, 2)))]
    ours = by_parts([x.detach() for x in tensors], BlockMask(document_BL, 64))
    for mine, their, true in zip(ours, theirs, truth, strict=True):
        error, floor = ((x - true).norm() / true.norm() for x in (mine, their))
        assert error < max((1.5 if kernel == "fused" else 3) * floor, 1e-6)


def test_what_is_hidden_is_not_computed(monkeypatch) -> None:
    monkeypatch.setattr(parts, "_TILE", 4)
    monkeypatch.setattr(parts, "_WIDE_TILE", 8)
    one = BlockMask(torch.zeros(2, 24, dtype=torch.int64), 12)
    assert not one.sees(0, 1)
    assert one.tiles(0, 1) == []
    # Row by row: wide tiles up to the diagonal, then a causal one; no mask is ever made.
    assert [(t.queries.start, t.keys.start, t.keys.stop, t.seen) for t in one.tiles(1, 1)] == [
        (0, 0, 4, parts._CAUSAL), (4, 0, 4, parts._WHOLE), (4, 4, 8, parts._CAUSAL),
        (8, 0, 8, parts._WHOLE), (8, 8, 12, parts._CAUSAL),
    ]  # fmt: skip
    assert [(t.keys.start, t.keys.stop) for t in one.tiles(1, 0)] == [(0, 8), (8, 12)] * 3
    # Documents that end with the tiles: only the diagonal is left.
    many = BlockMask((torch.arange(24) // 4)[None], 12)
    assert not many.sees(1, 0)
    assert [(t.queries, t.seen) for t in many.tiles(1, 1)] == [(t.keys, parts._CAUSAL) for t in many.tiles(1, 1)]
    # One row of two sees it: it is computed, with a mask.
    some = BlockMask(torch.stack([torch.zeros(24), torch.arange(24) // 12]).long(), 12)
    assert {t.seen for t in some.tiles(1, 0)} == {parts._SOME}


def test_no_tensor_is_as_large_as_the_scores(kernel, monkeypatch) -> None:
    """Most elements of one result: of 4 heads and 512² scores, at most a wide tile of them ever exists."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for x in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(x, Tensor):
                    self.elements = max(self.elements, x.numel())
            return made

    monkeypatch.setattr(parts, "_TILE", 32)
    monkeypatch.setattr(parts, "_WIDE_TILE", 64)
    document_BL = (torch.arange(512)[None] > 250).int()
    tensors = [x.float() for x in inputs(1, 512, 4, 4, width=8)]
    with Largest() as largest:
        by_parts(tensors, BlockMask(document_BL, 128))
    assert largest.elements <= 4 * 512 * 8  # that of q; scores would be 64 times as many


BUGS = {
    "weights of the merge left out": lambda r, m: (r[0].add_(m[0]), r[1].copy_(torch.logaddexp(r[1], m[1]))),
    "lse not merged": lambda r, m: MERGE((r[0], r[1].clone()), m),
    "the later part alone": lambda r, m: (r[0].copy_(m[0]), r[1].copy_(m[1])),
}
MERGE = parts.merge_


@pytest.mark.parametrize("bug", BUGS)
def test_sees_planted_bug(bug, monkeypatch) -> None:
    monkeypatch.setattr(parts, "merge_", BUGS[bug])
    document_BL = (torch.arange(24)[None] > 13).int()
    tensors = inputs(1, 24, 2, 1)
    ours = [x.nan_to_num(1e3, 1e3, -1e3) for x in by_parts(tensors, BlockMask(document_BL, 6))]
    assert distance(ours, plain_softmax(tensors, document_BL)) > 1e-10


def test_sees_a_backward_with_a_partial_lse(monkeypatch) -> None:
    """Each part's own lse in place of that over all keys."""
    kernel = parts._fused_gradients

    def own_lse(of_out, qkv, result, visible, causal):
        return kernel(of_out, qkv, (result[0], parts._fused(*qkv, visible, causal)[1]), visible, causal)

    monkeypatch.setattr(parts, "_fused_gradients", own_lse)
    document_BL = torch.zeros(1, 24, dtype=torch.int64)
    tensors = inputs(1, 24, 2, 1)
    assert distance(by_parts(tensors, BlockMask(document_BL, 6)), plain_softmax(tensors, document_BL)) > 1e-10
