"""Rows of embeddings by themselves: the same update bit for bit, and the rows that a batch needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import JobError
from shoal.job.optim import OptimOptions
from shoal.shard import Shard
from shoal.sync.server import messages as m
from shoal.sync.server.messages import COORDINATOR, Address, Apply, Key, Piece, Rows
from shoal.sync.server.node import frames
from shoal.sync.server.node.cuts import cuts, fill
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import Block
from shoal.sync.server.rows import fits, numbers, rows_wanted, shapes, sparse_pieces
from shoal.sync.server.rules import Rules
from shoal.sync.server.shard import ServerShard
from shoal.sync.server.wire import FrameError

# Rows 10 … 29 of an embedding lie here.
HERE = Piece("embed", (10, 0), (20, 4))
WORKER = Address("worker", 0, 1)


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


def asked(*rows: int, pieces: tuple[Piece, ...] = (HERE,)) -> tuple[Rows, ...]:
    return rows_wanted(pieces, "embed", np.array(rows), 4)


def test_rows_that_a_batch_needs():
    (rows,) = asked(3, 11, 12, 29, 30)
    assert (rows.place, numbers(rows.bits).tolist(), len(rows.bits)) == (0, [1, 2, 19], 3)
    scale, other = Piece("scale", (), ()), Piece("embed", (30, 0), (9, 4))
    pieces = (scale, HERE, Piece("head", (10, 0), (20, 4)), other)
    found = asked(11, 30, 38, pieces=pieces)
    assert [(place, numbers(bits).tolist()) for place, bits in found] == [(1, [1]), (3, [0, 8])]
    assert shapes(pieces, found) == [(), (1, 4), (20, 4), (2, 4)]
    assert [numbers(bits).tolist() for _, bits in asked(3, 30)] == [[]], "none of them is here"


def test_all_rows_are_pulled_where_naming_some_costs_as_much():
    narrow = Piece("embed", (0, 0), (32, 1))
    # Two bytes a number: what is left out is 6 and 10 bytes, and 4 bytes a message name the rows.
    for left, expected in ((3, 0), (4, 0), (5, 1)):
        found = rows_wanted((narrow,), "embed", np.arange(32 - left), 2)
        assert len(found) == expected, left


@pytest.mark.parametrize(
    "wrong",
    [
        Rows(1, bytes(3)), Rows(-1, bytes(3)), Rows(0, bytes(2)), Rows(0, bytes(4)), Rows(0, b"\0\0\x10"), Rows(2, b""),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_there_are_not_are_refused(wrong):
    scale = Piece("scale", (), ())
    assert not fits((HERE,) if wrong.place < 2 else (HERE, HERE, scale), (wrong,))
    right = Rows(0, b"\0\0\x08")
    assert fits((HERE,), (right,))
    assert not fits((HERE,), (right, right))
    server = ServerShard(0, parameters(OptimOptions()))
    with pytest.raises(JobError, match="rows were asked for"):
        server.handle(WORKER, m.Pull(Key(0, 0, 0), 5, (HERE,), rows=(right, wrong)), (), 0.0)
    with pytest.raises(FrameError, match="rows of what"):
        frames.places(m.Pulled(Key(0, 0, 0), 0, 0, (HERE,), rows=(right, wrong)), [4], torch.float32)
    assert server.handle(COORDINATOR, m.Copies(1, (0,)), (), 0.0) == []


SHAPES = {"embed": (40, 6), "scale": ()}
WHERE = [[Block("embed", 0, 17), Block("scale", 0, 1)], [Block("embed", 17, 40)]]


def servers(options: OptimOptions, level: str, compensation: str) -> list[ServerShard]:
    made = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}
    rules = Rules("asp", workers=3, compensation=compensation)
    held = [Parameters(blocks(values, each), rules, options, 10) for each in WHERE]
    return [ServerShard(number, each, level=level) for number, each in enumerate(held)]


def commit(server: ServerShard, version: int, value: float) -> None:
    """A gradient of every third row: optimizers move the others, too."""
    key, pieces = Key(1, 0, version), server.held.pieces()
    gradient = [torch.zeros(piece.shape) for piece in pieces]
    gradient[0][version % 3 :: 3] = value
    server.handle(Address("worker", 1, 1), m.Stage(key, 0, 1, pieces), gradient, 0.0)
    server.handle(COORDINATOR, m.Apply(version, (key,), 0.5, 0.01, 0), (), 0.0)


def pull(held: list[ServerShard], into: Sequence[Shard], version: int, row_N: np.ndarray | None) -> int:
    """As a rank does; the bytes that came."""
    came = 0
    for number, found in cuts(into, WHERE).items():
        pieces = tuple(each.piece for each in found)
        rows = () if row_N is None else rows_wanted(pieces, "embed", row_N, 4)
        (answer,) = held[number].handle(WORKER, m.Pull(Key(0, 0, 0), version, pieces, rows=rows), (), 0.0)
        places = frames.places(answer.message, [t.nbytes for t in answer.tensors], torch.float32)
        assert [place.shape for place in places] == [tensor.shape for tensor in answer.tensors]
        fill(found, answer.message.pieces, answer.tensors, answer.message.rows)
        came += sum(tensor.nbytes for tensor in answer.tensors)
    return came


COMMITS = st.tuples(st.floats(-2, 2, width=32), st.sets(st.integers(0, 39)), st.booleans())


@pytest.mark.parametrize(
    ("level", "compensation"),
    [("snapshot", "none"), ("snapshot", "look-ahead"), ("shard", "none"), ("hogwild", "none")],
)
@settings(max_examples=15)
@given(st.lists(COMMITS, min_size=1, max_size=6), st.integers(1, 39), st.sampled_from(["adamw", "sgd"]))
def test_rows_are_those_of_a_whole_pull_and_others_stay(level, compensation, commits, cut, name):
    """Bit for bit, of the version before the latest, too, by a rank with two parts of the embedding."""
    held = servers(OptimOptions(name=name, weight_decay=0.1), level, compensation)
    places = [("embed", (0, 0), (cut, 6)), ("embed", (cut, 0), (40 - cut, 6)), ("scale", (), ())]
    some, whole = (
        [Shard(name, SHAPES[name], offsets, torch.full(size, -1.0)) for name, offsets, size in places] for _ in range(2)
    )
    expected = torch.full((40, 6), -1.0)
    for version, (value, words, before) in enumerate(commits, 1):
        for server in held:
            commit(server, version, value)
        wanted = version - (before and level == "snapshot" and version > 1)
        rows = sorted(words)
        came = pull(held, some, wanted, np.array(rows, np.int64))
        pull(held, whole, wanted, None)
        dense = torch.cat([each.local for each in whole[:2]])
        expected[rows] = dense[rows]
        assert torch.equal(torch.cat([each.local for each in some[:2]]), expected)
        assert torch.equal(some[2].local, whole[2].local)
        assert came == 4 * (6 * len(rows) + 1)
