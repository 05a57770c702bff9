"""Memory that is received into again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from shoal.job.optim import OptimOptions
from shoal.sync.server import messages as m
from shoal.sync.server.messages import Address, Key, Piece
from shoal.sync.server.node.book import Book
from shoal.sync.server.node.pool import Pool
from shoal.sync.server.node.serve import Serving
from shoal.sync.server.node.station import Said
from shoal.sync.server.parameters import Parameters, blocks
from shoal.sync.server.placement import Block
from shoal.sync.server.rules import Rules
from shoal.sync.server.shard import ServerShard

SIDE = 256


def test_what_was_given_back_is_received_into_again_in_any_shape():
    pool = Pool()
    first = pool.take((SIDE, SIDE), torch.float32)
    where = first.data_ptr()
    other = pool.take((SIDE, SIDE), torch.float32)
    assert other.data_ptr() != where, "nobody has given it back"
    pool.give([first])
    again = pool.take((2, SIDE, SIDE), torch.float16)
    assert (again.data_ptr(), again.shape, again.dtype) == (where, (2, SIDE, SIDE), torch.float16)
    assert again.is_contiguous()
    assert pool.take((SIDE, SIDE), torch.float32).data_ptr() != where, "once"


def test_other_sizes_and_more_than_it_keeps_are_new():
    pool = Pool(most=SIDE * SIDE * 4)
    tensors = [pool.take((SIDE, SIDE), torch.float32) for _ in range(2)]
    places = [tensor.data_ptr() for tensor in tensors]
    pool.give(tensors)
    assert pool.take((SIDE, SIDE + 1), torch.float32).data_ptr() not in places
    assert pool.take((SIDE, SIDE), torch.float32).data_ptr() == places[0]
    assert pool.take((SIDE, SIDE), torch.float32).data_ptr() not in places


class Mailbox:
    """A station that nobody talks to, and what is given back to it."""

    def __init__(self):
        self.back: list[torch.Tensor] = []
        self.book = Book(Path())

    def connected(self, address: Address) -> bool:
        return True

    def send(self, to: Address, message: m.Message, tensors: Sequence[torch.Tensor] = ()) -> None:
        pass

    def give_back(self, tensors: Sequence[torch.Tensor]) -> None:
        self.back += tensors


@pytest.mark.parametrize("others", [(), (1,)])
def test_a_shard_gives_back_what_it_has_staged_unless_it_is_on_its_way_to_another_copy(others: tuple[int, ...]):
    held = Parameters(blocks({"w": torch.zeros(SIDE)}, [Block("w", 0, SIDE)]), Rules("asp"), OptimOptions(), 1)
    mailbox, machine = Mailbox(), ServerShard(0, held, others=others)
    serving = Serving(machine, mailbox, None, save=lambda version, values: None, poll=list)
    gradient = torch.arange(float(SIDE))
    key = Key(0, 0, 0)
    stage = m.Stage(key, 0, 1, (Piece("w", (0,), (SIDE,)),))
    for _ in range(2):
        serving._take(Said(Address("worker", 0, 1), stage, [gradient]))
    assert [id(each) for each in mailbox.back] == ([] if others else [id(gradient)] * 2)
    kept = machine.staged[key].gradient[0].clone()
    gradient.fill_(-1.0)
    assert torch.equal(machine.staged[key].gradient[0], kept), "it is its own"
