"""Clusters of several pools: one pipeline through all of them, whose stages have as many blocks as their pool is fast.

Every stage lies in one pool, and is as many ranks everywhere; 1F1B, one stage a rank. For models that no pool holds
alone, and for lines between sites: a pipeline sends activations over them, not gradients.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np

from shoal.job.layout import Layout
from shoal.planning import candidates
from shoal.planning.plan import Answer, Plan, Question
from shoal.planning.stages import Stages
from shoal.planning.through import Through

# Candidates whose blocks are divided, at most; of these how many are simulated for each that is wanted; pools of which
# every order is tried.
_DIVIDED, _SIMULATED, _ORDERED = 1000, 5, 4


class Search:
    """All pipelines through all pools."""

    def __init__(self, question: Question):
        self.question, self.pools, shape = question, question.cluster.pools, question.shape
        together = math.gcd(*(pool.count for pool in self.pools))
        # Blocks of two kinds are not as dear as each other: whose are which is not looked for.
        alike = not shape.experts or not shape.dense_layers
        self.stages = [
            Stages(question, each)
            for each in candidates.divisors(together)
            if alike and question.cluster.count // each <= min(shape.layers, question.global_batch)
        ]
        self.computed = 0

    @property
    def orders(self) -> list[tuple[int, ...]]:
        """Of the pools along the pipeline; of many pools the cluster's own."""
        several = range(len(self.pools))
        return list(permutations(several)) if len(self.pools) <= _ORDERED else [tuple(several)]

    @property
    def candidates(self) -> int:
        return sum(len(stages.splits[0]) for stages in self.stages) * len(self.orders)

    def fastest(self, best: int) -> list[Plan]:
        """At most so many, the fastest first, each of another base."""
        wanted = _SIMULATED * best
        found: dict[tuple[int, int], tuple[float, Through]] = {}
        for bound, one in self._sorted():
            fastest = heapq.nsmallest(wanted, (seconds for seconds, _ in found.values()))
            if self.computed >= _DIVIDED or (len(fastest) == wanted and bound > fastest[-1]):
                break
            self.computed += 1
            base = one.stages.each, int(one.stages.splits[0][one.candidate])
            if one.estimate is not None and (base not in found or one.estimate < found[base][0]):
                found[base] = one.estimate, one
        nearest = heapq.nsmallest(wanted, found.values(), key=lambda pair: pair[0])
        return sorted((one.fastest().plan() for _, one in nearest), key=lambda plan: plan.seconds)[:best]

    def _sorted(self) -> Iterator[tuple[float, Through]]:
        """All candidates that have memory for all blocks, by their bounds."""
        rows, layers = [], self.question.shape.layers
        for stages in self.stages:
            for order in self.orders if len(stages.splits[0]) else ():
                most, bounds = stages.most(order), stages.bounds(order[-1])
                fitting = np.flatnonzero((most >= 1).all(axis=1) & (most.sum(axis=1) >= layers))
                rows += [(float(bounds[n]), Through(stages, int(n), order, most[n])) for n in fitting]
        return iter(sorted(rows, key=lambda row: row[0]))


def find(question: Question, layout: Layout, along: Sequence[str] = ()) -> Through | None:
    """This layout through all pools, with blocks divided as it says, or as is fastest; None where it is none of the
    candidates. along: names of the pools in its order; else the order that is best."""
    stages, pools = Stages(question, layout.world // layout.pipeline), question.cluster.pools
    base, fsdp, zero = stages.splits
    bases, same = stages.spaces[0].bases, (fsdp == layout.fsdp) & (zero == layout.zero)
    wanted = {name: getattr(layout, name) for name in ("tensor", "context", "expert")}
    wanted |= {"micro_batch": layout.micro_batch or None, "data": layout.replicas * layout.fsdp}
    wanted["recompute"] = layout.recompute == "block"
    for name, value in wanted.items():
        same &= (value is None) | (getattr(bases, name)[base] == value)
    found = []
    for order in permutations(range(len(pools))):
        if along and tuple(pools[n].name for n in order) != tuple(along):
            continue
        for n in np.flatnonzero(same):
            one = Through(stages, int(n), order, stages.most(order)[n], given=layout.blocks_per_stage)
            if len(one.divisions):
                one = one.fastest()
                found.append((not one.fits, one.plan().seconds, one))
    return min(found, key=lambda row: row[:2])[2] if found else None


def search(question: Question, best: int = 10) -> Answer:
    """As `search.search`, of a cluster of several pools."""
    begin = time.perf_counter()
    found = Search(question)
    plans = tuple(found.fastest(best + 1))
    seconds, more = time.perf_counter() - begin, len(plans) > best
    return Answer(plans[:best], seconds, found.candidates, found.computed, None, more)
