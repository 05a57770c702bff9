"""What ranks exchange with shards: together each element once, whatever both sides are cut into."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.job.optim import OptimOptions
from shoal.shard import Shard
from shoal.sync.server.node.cuts import cuts, fill
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import place
from shoal.sync.server.rules import Rules

SHAPES = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1
)


def boxes(draw, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, shape) of boxes that make up a tensor, some of them empty."""
    whole = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        offsets, size = whole.pop(draw(st.integers(0, len(whole) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, size[axis]))
        whole.append((offsets, (*size[:axis], at, *size[axis + 1 :])))
        moved = (*offsets[:axis], offsets[axis] + at, *offsets[axis + 1 :])
        whole.append((moved, (*size[:axis], size[axis] - at, *size[axis + 1 :])))
    return whole


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Every element another."""
    found, first = {}, 1
    for name, shape in shapes.items():
        count = math.prod(shape)
        found[name] = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
    return found


def view(tensor: Tensor, offsets: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offsets, size, strict=True))]


@settings(max_examples=150)
@given(st.data(), SHAPES, st.booleans())
def test_each_element_goes_and_comes_once(data, shapes, split_rows):
    """As gradients are pushed, and weights pulled."""
    values = numbered(shapes)
    servers = place(shapes, data.draw(st.integers(1, len(shapes))), split_rows=split_rows)
    ranks: list[list[Shard]] = [[] for _ in range(3)]
    for name, shape in shapes.items():
        for offsets, size in boxes(data.draw, shape):
            piece = view(values[name], offsets, size)
            rank = data.draw(st.integers(0, 2))
            ranks[rank].append(Shard(name, shape, offsets, torch.zeros_like(piece), piece.clone()))
    options = OptimOptions(name="sgd", lr=1.0)
    held = [Parameters(blocks(values, each), Rules(), options, 1) for each in servers]
    pushed = [each.blank() for each in held]
    elements = 0
    for rank in ranks:
        for server, found in cuts(rank, servers).items():
            pieces = [cut.piece for cut in found]
            gradients = [cut.of(cut.shard.grad) for cut in found]
            held[server].put(pushed[server], pieces, gradients)
            elements += sum(gradient.numel() for gradient in gradients)
            fill(found, pieces, held[server].cut(held[server].live(), pieces))
    assert elements == sum(value.numel() for value in values.values())
    for server, gradient in zip(held, pushed, strict=True):
        assert all(torch.equal(part, shard.local) for part, shard in zip(gradient, server.shards, strict=True))
    for shard in (shard for rank in ranks for shard in rank):
        assert torch.equal(shard.local, shard.grad), f"{shard.name} {shard.offsets}"


def test_a_piece_that_a_rank_has_twice_is_filled_twice():
    """Tied embeddings where first and last stage of a pipeline are on one rank."""
    values = numbered({"embed": (6, 2)})
    servers = place({"embed": (6, 2)}, 1)
    first, last = (Shard("embed", (6, 2), (0, 0), torch.zeros(6, 2, dtype=torch.float64)) for _ in range(2))
    found = cuts([first, last], servers)[0]
    fill(found, [found[0].piece], [values["embed"]])
    assert torch.equal(first.local, values["embed"])
    assert torch.equal(last.local, values["embed"])
