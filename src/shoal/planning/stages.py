"""What a stage of a pipeline through several pools may be, as columns of numbers, in each of the pools."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from shoal.planning import candidates, constants, memory, step
from shoal.planning.candidates import Numbers
from shoal.planning.cluster import Cluster, Pool
from shoal.planning.plan import Question
from shoal.planning.search import SPARE, Space
from shoal.planning.step import Blocks, Passes, Step
from shoal.planning.work import Array, Work

SCHEDULE = "1f1b"


class Stages:
    """All candidates whose stages are of `each` ranks, those of all replicas together. Pools are known by number."""

    def __init__(self, question: Question, each: int):
        self.question, self.each, self.pools = question, each, question.cluster.pools
        self.counts = tuple(pool.count // each for pool in self.pools)
        self.ranks = sum(self.counts)
        self.known = constants.load()
        self.spaces = [self._space(pool) for pool in self.pools]

    def _space(self, pool: Pool) -> Space:
        """Of one stage in this pool: what a rank of it may be, without a pipeline."""
        one = Cluster(pool.name, (replace(pool, count=self.each),), {})
        space = Space(replace(self.question, cluster=one))
        bases = space.bases
        batches = self.question.global_batch // (bases.data * bases.micro_batch)
        # 1F1B has no fewer micro-batches than ranks.
        space.bases = bases.take((bases.pipeline == 1) & (batches >= self.ranks))
        return space

    @cached_property
    def splits(self) -> tuple[Numbers, Numbers, Numbers]:
        """(base, fsdp, ZeRO's stage) of each candidate."""
        bases, question = self.spaces[0].bases, self.spaces[0].question
        rows = [(n, *pair) for n in range(len(bases)) for pair in candidates.splits(bases, n, question)]
        base, fsdp, zero = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        return base, fsdp, zero

    @property
    def micro_batches(self) -> Numbers:
        """Of each candidate."""
        bases, base = self.spaces[0].bases, self.splits[0]
        return np.asarray(self.question.global_batch // (bases.data[base] * bases.micro_batch[base]))

    @cached_property
    def passes(self) -> list[Passes]:
        """Of each pool, of each candidate: seconds of a block and a micro-batch."""
        every = np.arange(len(self.splits[0]))
        return [step.passes(*self._priced(pool, every, 1)) for pool in range(len(self.pools))]

    def bounds(self, last: int) -> Array:
        """Seconds that no division of blocks is under, where the pipeline ends in pool `last`: were blocks shared as if
        they could be cut, and nobody waited but for the first micro-batch."""
        of_block = [passed.forward + passed.backward for passed in self.passes]
        layers, head = self.question.shape.layers, self.passes[last].head
        speed = sum(count / seconds for count, seconds in zip(self.counts, of_block, strict=True))
        slowest = np.maximum((layers + head / of_block[last]) / speed, head + of_block[last])
        first: Array = layers * np.min(of_block, axis=0) + head
        return np.asarray((self.micro_batches - 1) * slowest + first)

    def work(self, pool: int, which: Numbers, blocks: int) -> tuple[Work, Blocks]:
        """Of these candidates, as if every rank of the pipeline had so many blocks and were in this pool."""
        work, known = self.spaces[pool].work(*(part[which] for part in self.splits))
        ranks = np.full(len(which), float(self.ranks))
        layers = blocks * ranks
        columns = {**work.columns, "pipeline": ranks, "devices": ranks * self.each, "layers": layers}
        # Of a model without experts this is all of its blocks.
        columns["dense_layers"] = np.where(work.experts > 0, work.dense_layers, layers)
        return replace(work, columns=columns), known

    def _priced(self, pool: int, which: Numbers, blocks: int) -> tuple[Work, constants.Constants, Blocks]:
        work, known = self.work(pool, which, blocks)
        return work, self.known, known

    def cost(self, pool: int, candidate: int, blocks: int) -> Step:
        """Of one candidate, as in `work`."""
        work, constants_, known = self._priced(pool, np.array([candidate]), blocks)
        return step.cost(work, constants_, SCHEDULE, known)

    def memory(self, pool: int, which: Numbers, rank: int, blocks: int) -> memory.Memory:
        """Of one rank of the pipeline."""
        work, _ = self.work(pool, which, blocks)
        return memory.stage(work, np.full(len(which), float(rank)), SCHEDULE)

    def places(self, order: tuple[int, ...]) -> tuple[int, ...]:
        """Of each rank of the pipeline its pool, in this order of the pools."""
        return tuple(pool for pool in order for _ in range(self.counts[pool]))

    def most(self, order: tuple[int, ...]) -> Numbers:
        """Blocks that each rank of the pipeline has memory for, (candidates, ranks).

        A block takes as many bytes as another, and more the more micro-batches are in flight: one more on each rank
        than on the next (Narayanan et al. 2021, section 2.2). So two ranks between the ends tell of those between them.
        """
        places, every = self.places(order), np.arange(len(self.splits[0]))
        found = np.zeros((len(every), self.ranks))
        for pool in order:
            held = [rank for rank, place in enumerate(places) if place == pool]
            inner = [rank for rank in held if 0 < rank < self.ranks - 1]
            ends = sorted({*inner[:1], *inner[-1:], *(set(held) - set(inner))})
            first, more = {}, {}
            for rank in ends:
                room = self.pools[pool].device.memory
                one, two = (self.memory(pool, every, rank, blocks).total("device", room) for blocks in (1, 2))
                first[rank], more[rank] = one, two - one
            for rank in held:
                one, each = (_between(of, rank, inner) for of in (first, more))
                free = room / SPARE - one
                found[:, rank] = np.where(free < 0, 0, 1 + np.floor(free / np.maximum(each, 1.0)))
        return np.minimum(found, self.question.shape.layers).astype(np.int64)


def _between(known: dict[int, Array], rank: int, inner: list[int]) -> Array:
    """On a straight line between the first and the last of `inner`."""
    if rank in known:
        return known[rank]
    low, high = inner[0], inner[-1]
    return known[low] + (known[high] - known[low]) * ((rank - low) / (high - low))
