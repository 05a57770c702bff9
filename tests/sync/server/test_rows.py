"""Rows of embeddings by themselves: the same update bit for bit, and the rows that a batch needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.job.optim import OptimOptions
from shoal.sync.server.messages import Apply, Key, Piece
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import Block
from shoal.sync.server.rows import rows_wanted, sparse_pieces
from shoal.sync.server.rules import Rules

# Rows 10 … 29 of an embedding lie here.
HERE = Piece("embed", (10, 0), (20, 4))


def parameters(options: OptimOptions) -> Parameters:
    value = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return Parameters(blocks({"embed": value}, [Block("embed", 10, 30)]), Rules(), options, 10)


def gradient(rows: list[int]) -> Tensor:
    made = torch.zeros(20, 4)
    made[rows] = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(len(rows)))
    return made


def test_runs_of_rows_that_are_not_zero():
    found = sparse_pieces(HERE, gradient([0, 3, 4, 5, 19]))
    assert [piece for piece, _ in found] == [
        Piece("embed", (10, 0), (1, 4)),
        Piece("embed", (13, 0), (3, 4)),
        Piece("embed", (29, 0), (1, 4)),
    ]
    assert torch.equal(found[1][1], gradient([0, 3, 4, 5, 19])[3:6])
    assert sparse_pieces(HERE, torch.zeros(20, 4)) == []


def test_rows_that_are_too_many_or_no_rows_travel_whole():
    many = gradient(list(range(0, 20, 2)))
    assert len(sparse_pieces(HERE, many)) == 10
    ((piece, tensor),) = sparse_pieces(HERE, many, most=0.49)
    assert (piece, tensor.data_ptr()) == (HERE, many.data_ptr())
    scalar = Piece("s", (), ())
    assert sparse_pieces(scalar, torch.tensor(0.0)) == [(scalar, torch.tensor(0.0))]
    vector = sparse_pieces(Piece("v", (3,), (4,)), torch.tensor([0.0, 2.0, 0.0, 0.0]))
    assert [(piece.offsets, tensor.tolist()) for piece, tensor in vector] == [((4,), [2.0])]


@pytest.mark.parametrize("options", [OptimOptions(), OptimOptions(name="sgd")])
def test_a_push_of_some_rows_is_the_whole_push_bit_for_bit(options):
    whole, sparse = parameters(options), parameters(options)
    for step, rows in enumerate(([1, 2, 7], [7], [], list(range(15)), [0, 19])):
        made = gradient(rows)
        if step == 1:
            made[3], made[4, 1] = -0.0, torch.nan
        pushed, staged = sparse_pieces(HERE, made), sparse.blank()
        assert sum(tensor.numel() for _, tensor in pushed) == 4 * len(rows) + (8 if step == 1 else 20 * (step == 3))
        sparse.put(staged, [piece for piece, _ in pushed], [tensor for _, tensor in pushed])
        full = whole.blank()
        whole.put(full, [HERE], [made])
        assert torch.equal(staged[0].view(torch.int32), full[0].view(torch.int32))
        if step == 1:
            continue
        assert whole.squares(full) == sparse.squares(staged)
        for held, part in ((whole, full), (sparse, staged)):
            held.apply(part, Apply(step, (Key(0, 0, step),), 0.1, 0.01, 0), None)
        for mine, theirs in zip(whole.state().shards, sparse.state().shards, strict=True):
            assert torch.equal(mine.local.view(torch.int32), theirs.local.view(torch.int32))


def test_rows_that_a_batch_needs():
    wanted = rows_wanted(HERE, [29, 3, 12, 11, 30, 12])
    assert wanted == (Piece("embed", (11, 0), (2, 4)), Piece("embed", (29, 0), (1, 4)))
    held = parameters(OptimOptions())
    first, last = held.cut(held.live(), wanted)
    assert torch.equal(first, held.live()[0][1:3])
    assert torch.equal(last, held.live()[0][19:])
    assert rows_wanted(HERE, [3, 30]) == ()
