"""Which server shard holds which parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from shoal.job import Job
from shoal.job.server import too_many
from shoal.models.spec import parameters

ELEMENTWISE = ("adamw", "sgd")
"""Optimizers that update each number by itself, so that rows of a parameter may lie on several shards."""


@dataclass(frozen=True, order=True)
class Block:
    """Rows start … stop − 1 (along the first dimension) of one parameter; of a scalar, start 0 and stop 1."""

    name: str
    start: int
    stop: int


def place(
    shapes: Mapping[str, tuple[int, ...]], shards: int, *, split_rows: bool = False, itemsize: int = 4
) -> list[list[Block]]:
    """For each server shard, the blocks that it holds, in the order of names: about the same bytes everywhere.

    Largest first, each to the shard that has least so far (Graham 1969, "Bounds on Multiprocessing Timing Anomalies",
    section on LPT: at most 4/3 of the best largest load; bin packing by first-fit decreasing would ask for bins of a
    given size, and shards have none). split_rows: parameters larger than a shard's part are cut into blocks of rows;
    for element-wise optimizers only. itemsize: bytes of an element. Raises JobError where a shard would hold nothing.
    """
    assert shards > 0
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    part = math.ceil(sum(sizes.values()) / shards)
    blocks = [
        block for name, shape in shapes.items()
        for block in _cut(name, shape, math.ceil(sizes[name] / part) if split_rows and part else 1)
    ]  # fmt: skip
    if len(blocks) < shards:
        raise too_many(shards, len(blocks))

    def size(block: Block) -> int:
        rows = shapes[block.name][0] if shapes[block.name] else 1
        return sizes[block.name] * (block.stop - block.start) // max(1, rows)

    held: list[list[Block]] = [[] for _ in range(shards)]
    loads = [0] * shards
    for block in sorted(blocks, key=lambda b: (-size(b), b)):
        # Of two equal loads the one with fewer blocks: empty parameters do not pile up on one shard.
        least = min(range(shards), key=lambda i: (loads[i], len(held[i]), i))
        held[least].append(block)
        loads[least] += size(block)
    return [sorted(blocks) for blocks in held]


def of_job(job: Job) -> list[list[Block]]:
    """For each server shard of the job, the blocks that it holds.

    The job's vocabulary is known. What is not learned lies on the first shard. Raises JobError for more shards than
    parameters, also where these have rows enough.
    """
    specs = parameters(job.model)
    shapes = {name: spec.shape for name, spec in specs.items() if spec.learned}
    if job.server.shards > len(shapes):
        raise too_many(job.server.shards, len(shapes))
    first, *others = place(shapes, job.server.shards, split_rows=job.optim.name in ELEMENTWISE)
    # Few numbers, without an optimizer's state; and every shard has something to learn.
    fixed = [Block(name, 0, spec.shape[0]) for name, spec in specs.items() if not spec.learned]
    return [sorted([*first, *fixed]), *others]


def _cut(name: str, shape: tuple[int, ...], count: int) -> list[Block]:
    """`count` blocks of about equal rows, or as many as there are rows."""
    rows = shape[0] if shape else 1
    count = max(1, min(count, rows))
    edges = [rows * i // count for i in range(count + 1)]
    return [Block(name, start, stop) for start, stop in pairwise(edges)]
