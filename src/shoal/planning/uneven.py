"""Clusters of several pools: replicas of one layout in all of them, each of which computes as much as its pool is fast.

A replica lies in one pool. All have the same layout (a job has one), and their shares of the batch are whole
micro-batches (`replica_share`), so that they end at about the same time. Gradients go over the slowest of the links.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from shoal.job.check import require
from shoal.planning import candidates, constants, memory, step, syncs
from shoal.planning.candidates import NAMES, Numbers
from shoal.planning.cluster import Cluster, Pool
from shoal.planning.plan import Answer, Plan, Question
from shoal.planning.search import SPARE, Space
from shoal.planning.step import Step
from shoal.planning.work import Array, Flags, Work

# Schedules whose rounds depend on the number of micro-batches, which differs here from replica to replica.
_IN_ROUNDS = ("interleaved", "interleaved_zero_bubble")
# Of candidates those that are computed exactly, at most; ones that are as fast as the fastest, within so much.
_EXACT, _EQUAL = 2000, 0.005


@dataclass(frozen=True)
class Held:
    """What a pool has: replicas, and micro-batches of a step of each."""

    pool: Pool
    micro_batches: tuple[int, ...]


@dataclass(frozen=True)
class Uneven:
    """plan: its layout has the shares, pool after pool. seconds: of each pool's slowest replica."""

    plan: Plan
    held: tuple[Held, ...]
    seconds: tuple[float, ...]


def shared(slope: Sequence[float], fixed: Sequence[float], counts: Sequence[int], least: int, whole: int) -> list[int]:
    """Micro-batches of each replica, pool after pool, so that the last is done as early as can be.

    A replica of pool p takes fixed[p] + slope[p] · m seconds for m micro-batches, at least `least` of them; together
    they have `whole`. [] where these are not enough. Of two that end at the same time the dearer one has fewer.
    """
    ends = [(fixed[p] + slope[p] * least, p, least) for p, count in enumerate(counts) for _ in range(count)]
    left = whole - least * len(ends)
    if left < 0:
        return []
    # Whoever would end first with one more gets it: no other order ends earlier, as each only adds.
    queue = [(end + slope[p], -1 / slope[p], n) for n, (end, p, _) in enumerate(ends)]
    heapq.heapify(queue)
    found, pools = [least] * len(ends), [p for _, p, _ in ends]
    for _ in range(left):
        end, rank, n = heapq.heappop(queue)
        found[n] += 1
        heapq.heappush(queue, (end + slope[pools[n]], rank, n))
    return found


class Search:
    """All layouts that replicas of every pool can have."""

    def __init__(self, question: Question):
        require(
            syncs.plain(question), "another sync than all-reduce is not planned on several pools", "--sync allreduce"
        )
        self.question, self.pools = question, question.cluster.pools
        self.together = math.gcd(*(pool.count for pool in self.pools))
        # As many devices of each as all have in common, with a batch that every layout of them can share.
        batch = self.together * 32 * question.shape.layers
        self.spaces = [Space(self._of_one(pool, self.together, batch)) for pool in self.pools]
        self.known, self.computed = constants.load(), 0

    def _of_one(self, pool: Pool, count: int, batch: int) -> Question:
        one = Cluster(pool.name, (replace(pool, count=count),), {})
        return replace(self.question, cluster=one, global_batch=batch, replicas=0)

    @cached_property
    def _splits(self) -> tuple[Numbers, Numbers, Numbers]:
        """(base, fsdp, zero) of each candidate."""
        bases = self.spaces[0].bases
        rounds = np.isin(bases.schedule, [NAMES.index(name) for name in _IN_ROUNDS])
        rows = [
            (base, fsdp, zero)
            for base in np.flatnonzero(~rounds)
            for fsdp, zero in candidates.splits(bases, int(base), self.spaces[0].question)
            if self.question.global_batch % (fsdp * int(bases.micro_batch[base])) == 0
        ]
        found = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return found[:, 0], found[:, 1], found[:, 2]

    @cached_property
    def ranks(self) -> Numbers:
        """Of a replica."""
        base, fsdp, _ = self._splits
        bases = self.spaces[0].bases
        return np.asarray(bases.tensor[base] * bases.context[base] * bases.pipeline[base] * fsdp)

    @cached_property
    def least(self) -> Numbers:
        """Micro-batches that a replica's schedule needs, and for which its time is a straight line."""
        base, _, _ = self._splits
        bases = self.spaces[0].bases
        twice = bases.schedule[base] == NAMES.index("dualpipev")
        return np.asarray(np.where(bases.pipeline[base] > 1, bases.pipeline[base] * (1 + twice), 1))

    def work(self, pool: int, which: Numbers, micro_batches: Array) -> tuple[Work, step.Blocks]:
        """Of these candidates in a pool, beside the replicas of all others."""
        base, fsdp, zero = (part[which] for part in self._splits)
        work, known = self.spaces[pool].work(base, fsdp, zero)
        replicas = sum(one.count for one in self.pools) / self.ranks[which]
        data = replicas * work.fsdp
        columns = {**work.columns, "data": data, "devices": np.full(len(which), float(self.question.cluster.count))}
        columns["global_batch"] = micro_batches * work.micro_batch * data
        return replace(work, columns=columns), known

    def cost(self, pool: int, which: Numbers, micro_batches: Array) -> Step:
        """Of these candidates, with so many micro-batches of each replica of a pool. By schedule."""
        seconds = np.empty(len(which))
        parts: dict[str, Array] = {}
        schedules = self.spaces[pool].bases.schedule[self._splits[0][which]]
        for number in np.unique(schedules):
            rows = np.flatnonzero(schedules == number)
            work, known = self.work(pool, which[rows], micro_batches[rows])
            found = step.cost(work, self.known, NAMES[number], known)
            across = self._across(pool, which[rows], work, known)
            found.parts["data"][:], before = across, found.parts["data"].copy()
            seconds[rows] = found.seconds - before + across
            for name, part in found.parts.items():
                parts.setdefault(name, np.empty(len(which)))[rows] = part
        return Step(seconds, parts)

    def _across(self, pool: int, which: Numbers, work: Work, known: step.Blocks) -> Array:
        """Seconds of gradients that show, where they go over the slowest link from this pool to another."""
        one, cluster = self.pools[pool], self.question.cluster
        rate, latency = np.asarray(known.rates.nic, dtype=np.float64) + np.zeros(len(which)), 0.0
        for other in self.pools:
            if other is not one:
                link = cluster.link(one, other)
                apart = one.site != other.site
                # A site's line is shared by the rings of all ranks of a replica, each for a part of the gradients.
                rings = self.ranks[which] * step.members(work) if apart else 1.0
                rate = np.minimum(rate, link.bandwidth / rings)
                latency = max(latency, 2 * link.latency * apart)
        return step.gradients(work, self.known, known, replace(known.rates, nic=rate)) + latency

    def fits(self, pool: int, which: Numbers, micro_batches: Array) -> Flags:
        return np.asarray(self.bytes(pool, which, micro_batches) * SPARE <= self.pools[pool].device.memory)

    def bytes(self, pool: int, which: Numbers, micro_batches: Array) -> Array:
        """On the fullest device of each."""
        total = np.empty(len(which))
        schedules = self.spaces[pool].bases.schedule[self._splits[0][which]]
        for number in np.unique(schedules):
            rows = np.flatnonzero(schedules == number)
            work, _ = self.work(pool, which[rows], micro_batches[rows])
            total[rows] = memory.cost(work, NAMES[number]).total("device", self.pools[pool].device.memory)
        return total

    def fastest(self, best: int) -> list[Uneven]:
        """At most so many, the fastest first, each of another base."""
        base, fsdp, _ = self._splits
        which = np.arange(len(base))
        counts = np.stack([pool.count // self.ranks for pool in self.pools])
        whole = self.question.global_batch // (fsdp * self.spaces[0].bases.micro_batch[base])
        kept = whole >= self.least * counts.sum(axis=0)
        if self.question.replicas:
            kept &= counts.sum(axis=0) == self.question.replicas
        for pool in range(len(self.pools)):
            kept &= self.fits(pool, which, self.least.astype(np.float64))
        which = which[kept]
        if not len(which):
            return []
        slope, fixed = self._lines(which)
        counts, whole = counts[:, which], whole[which]
        # No shares end earlier than those that need not be whole.
        bound = (whole + (counts * fixed / slope).sum(axis=0)) / (counts / slope).sum(axis=0)
        found: dict[int, Uneven] = {}
        for at in np.argsort(bound, kind="stable")[:_EXACT]:
            fastest = heapq.nsmallest(best, (one.plan.seconds for one in found.values()))
            if len(fastest) == best and bound[at] > fastest[-1] * (1 + _EQUAL):
                break
            self.computed += 1
            least = int(self.least[which[at]])
            each = shared(slope[:, at].tolist(), fixed[:, at].tolist(), counts[:, at].tolist(), least, int(whole[at]))
            one = self._exactly(int(which[at]), each, counts[:, at].tolist())
            before = found.get(int(base[which[at]]))
            if one is not None and (before is None or one.plan.seconds < before.plan.seconds):
                found[int(base[which[at]])] = one
        return sorted(found.values(), key=lambda one: one.plan.seconds)[:best]

    def _lines(self, which: Numbers) -> tuple[Array, Array]:
        """Seconds of a micro-batch more, and of a step without any, (pools, n) each."""
        least = self.least[which].astype(np.float64)
        twice, more = (
            np.stack([self.cost(pool, which, often * least).seconds for pool in range(len(self.pools))])
            for often in (2, 3)
        )
        slope = (more - twice) / least
        return slope, twice - 2 * least * slope

    def _exactly(self, candidate: int, each: list[int], counts: list[int]) -> Uneven | None:
        """With these shares; None where they do not fit."""
        which, ends = np.array([candidate]), np.cumsum([0, *counts])
        held = [tuple(each[first:last]) for first, last in pairwise(ends)]
        most = [np.array([float(max(shares))]) for shares in held]
        if not all(self.fits(pool, which, many).all() for pool, many in enumerate(most)):
            return None
        steps = [self.cost(pool, which, many) for pool, many in enumerate(most)]
        seconds = tuple(float(one.seconds[0]) for one in steps)
        last = int(np.argmax(seconds))
        pools = tuple(Held(pool, shares) for pool, shares in zip(self.pools, held, strict=True))
        plan = self._plan(candidate, each, {name: float(part[0]) for name, part in steps[last].parts.items()}, last)
        return Uneven(plan, pools, seconds)

    def _plan(self, candidate: int, each: list[int], parts: dict[str, float], last: int) -> Plan:
        """parts: of the pool that is done last."""
        base, fsdp, zero = (int(part[candidate]) for part in self._splits)
        space, question = self.spaces[last], self.question
        layout = space.bases.layout(base, fsdp, zero, question.shape.layers)
        even = len(set(each)) == 1
        layout = replace(layout, replicas=len(each), replica_share="" if even else "+".join(map(str, each)))
        seconds = sum(parts.values())
        which, pools = np.array([candidate]), range(len(self.pools))
        # Of the pool whose devices are fullest.
        ends = np.cumsum([0, *(pool.count // layout.ranks_per_replica for pool in self.pools)])
        full = [self.bytes(n, which, np.array([float(max(each[ends[n] : ends[n + 1]]))])) for n in pools]
        fullest = max(pools, key=lambda n: float(full[n][0]) / self.pools[n].device.memory)
        work, _ = self.work(fullest, which, np.array([float(max(each[ends[fullest] : ends[fullest + 1]]))]))
        of_memory = {k: float(v[0]) for k, v in memory.cost(work, layout.schedule)._asdict().items()}
        of_memory["beside"] = float(full[fullest][0]) - sum(of_memory.values())
        rate = question.global_batch * question.sequence / seconds
        peak = sum(p.count * p.device.peak.get(question.precision, p.device.peak_16) for p in self.pools)
        spreads = [one.interval() for one in self.spaces]
        price = question.cluster.price
        exposed = sum(parts.get(name, 0.0) for name in ("tensor", "context", "fsdp", "messages", "data"))
        return Plan(
            layout=layout, chunks=int(space.bases.chunks[base]), seconds=seconds,
            low=seconds * min(low for low, _ in spreads), high=seconds * max(high for _, high in spreads),
            tokens_per_second=rate, per_device=rate / question.cluster.count,
            mfu=question.shape.flops_per_token(question.sequence) * rate / peak, memory=of_memory,
            capacity=self.pools[fullest].device.memory, parts=parts, bubble=parts["bubble"] / seconds,
            exposed=exposed / seconds, limit=_limit(parts, self.pools[last]),
            cost=None if price is None else price / 3600 / rate * 1e9,
            days=None if question.tokens is None else question.tokens / rate / 86400,
        )  # fmt: skip


def _limit(parts: dict[str, float], last: Pool) -> str:
    """last: the pool whose replicas are done last."""
    if parts["data"] > sum(part for name, part in parts.items() if name != "data"):
        return "reducing of gradients over the slowest link between replicas"
    return f"the replicas of pool {last.name}, which are done last"


def search(question: Question, best: int = 10) -> Answer:
    """As `search.search`, of a cluster of several pools."""
    begin = time.perf_counter()
    found = Search(question)
    plans = tuple(one.plan for one in found.fastest(best + 1))
    seconds, more = time.perf_counter() - begin, len(plans) > best
    return Answer(plans[:best], seconds, len(found.ranks), found.computed, None, more)


def shares(question: Question, plan: Plan) -> list[tuple[Pool, tuple[int, ...]]]:
    """Of each pool the shares of its replicas."""
    each, pools = plan.layout.shares, question.cluster.pools
    ends = np.cumsum([0, *(pool.count // plan.layout.ranks_per_replica for pool in pools)])
    return [(pool, each[first:last]) for pool, (first, last) in zip(pools, pairwise(ends), strict=True)]
