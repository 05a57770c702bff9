"""Between the ranks of one worker: what the first of them, the lead, tells the others, and whether all could do it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.mesh import Mesh
from shoal.sync.server import messages as m
from shoal.sync.server.messages import Key, Range

# What the lead says: the worker has ended, weights are to be pulled, what is owed is to be pushed, a push goes out,
# parts of it again, it is over.
END, PULL, REST, PUSH, AGAIN, DONE = range(6)

_NO_KEY = Key(0, 0, 0)


@dataclass(frozen=True)
class Command:
    """kind: END … DONE. whole: 1 where all rows of the embedding are to be pulled."""

    kind: int
    key: Key = _NO_KEY
    version: int = 0
    samples: Range = m.NOTHING
    whole: int = 1

    def words(self) -> list[int]:
        return [self.kind, *self.key, self.version, *self.samples, self.whole]

    @classmethod
    def of(cls, words: list[int]) -> Command:
        return cls(words[0], Key(*words[1:4]), words[4], Range(*words[5:7]), words[7])


_WORDS = 8

Told = tuple[Command, tuple[int, ...]]
"""With a copy of each shard, where that has a meaning; else none."""


def hear(mesh: Mesh, shards: int, say: Callable[[], Told]) -> Told:
    """What the lead says, on all ranks. say: called on the lead."""
    if mesh.world == 1:
        return say()
    if mesh.rank == 0:
        command, copies = say()
        told = torch.tensor([*command.words(), *copies, *[-1] * (shards - len(copies))], dtype=torch.int64)
    else:
        told = torch.zeros(_WORDS + shards, dtype=torch.int64)
    told = told.to(mesh.device)
    mesh.wait(dist.broadcast(told, 0, group=mesh.everyone, async_op=True))
    words: list[int] = told.tolist()
    return Command.of(words[:_WORDS]), tuple(words[_WORDS:])


def agreed(mesh: Mesh, found: Mapping[int, tuple[m.Pulled, Sequence[Any]]] | None) -> bool:
    """Whether all ranks have what they asked for, and of the same shadows: what several hold must be the same.

    found: what this rank has pulled from each shard.
    """
    if mesh.world == 1:
        return found is not None
    told = [pulled.chain.drawn for _, (pulled, _) in sorted((found or {}).items())]
    # By the largest of both signs, which is one number where all say the same.
    number = zlib.crc32(repr(told).encode())
    largest: Tensor = torch.tensor([found is None, number, -number], dtype=torch.int64, device=mesh.device)
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.everyone, async_op=True)
    mesh.wait(work)
    missing, high, low = largest.tolist()
    return not missing and high == -low
