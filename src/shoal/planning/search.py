"""The fastest layouts of a model on a cluster of one kind of device: all that a job may have, without computing all.

Bases and their splits: see `candidates`. What a block takes depends on few of the numbers, and is computed once for
each combination of these (leaves). Of each base a bound is computed, in time and in memory, that no split of it can
be under; then bases are computed in full in the order of their bounds, until the next one's is over what has been
found. So nothing that belongs to the answer is lost (Land and Doig 1960, branch and bound).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from shoal.job.check import require
from shoal.job.layout import Layout
from shoal.planning import candidates, constants, memory, piped, score, stacks, step, syncs, work
from shoal.planning.candidates import NAMES, Bases, Numbers
from shoal.planning.constants import DEVICE, Rates
from shoal.planning.piped import Case
from shoal.planning.plan import Answer, Plan, Question
from shoal.planning.step import Blocks, Step
from shoal.planning.work import Array, Work

SPARE = 1.10
"""A layout fits where so many times the prediction is no more than the device has."""
# Steps that differ by less count as equal.
_EQUAL = 0.005
# Bases that are ranked; that are computed in full at once; candidates whose bounds are.
_RANKED, _BLOCK, _CHUNK = 100, 256, 65_536
# Parts of a step that are not the pipeline's.
_BESIDE = ("data", "optimizer", "sync")


def search(question: Question, best: int = 10, alike: bool = True) -> Answer:
    """At most `best` plans, the fastest first, each of another base: of its splits the fastest. alike: also those that
    differ from a better one in nothing but schedule, stages or micro-batch. JobError for what is not tried: several
    kinds of devices."""
    begin = time.perf_counter()
    require(len(question.cluster.pools) == 1, "clusters of several pools are not searched so", "one pool: h100x64")
    space = Space(question)
    if not len(space.bases):
        return Answer((), time.perf_counter() - begin, 0, 0, None)
    found, compared = space.fastest(max(best, _RANKED))
    ranked = space.ranked(space.simulated(found))
    shown = (ranked if alike else space.unlike(ranked))[:best]
    plans = tuple(space.plan(one) for one in shown)
    nearest = None if plans else space.plan(space.smallest())
    return Answer(plans, time.perf_counter() - begin, space.size, compared, nearest, len(ranked) > len(shown))


@dataclass(frozen=True)
class Split:
    """A base and one of its splits, computed: seconds of a step, bytes on the fullest device. alone: where its pipeline
    was simulated, seconds that it takes when messages take none."""

    base: int
    fsdp: int
    zero: int
    seconds: float
    total: float
    alone: float | None = None


class Space:
    """All candidates of a question."""

    def __init__(self, question: Question):
        self.question, self.pool = question, question.cluster.pools[0]
        self.stack, self.known = stacks.STACKS[question.stack], constants.load()
        self.bases = candidates.bases(question)
        same = {**question.shape.columns, **self.pool.columns, "sequence": question.sequence}
        same |= {name: float(getattr(self.stack, name)) for name in work.STACK}
        same |= {"devices": self.pool.count, "global_batch": question.global_batch, "selective": 0.0}
        same["operators"] = 0.0
        sent = self.stack.gradient_bytes
        same |= {"sent": sent, "returned": sent, "moments": 12.0, "synced": 0.0}
        self._same = same | {"low": float(question.precision == "fp8")}

    @cached_property
    def size(self) -> int:
        """Candidates in all."""
        key = self._key(("tensor", "context", "expert", "data"))
        _, first, counts = np.unique(key, return_index=True, return_counts=True)
        return int(sum(n * len(self._splits(int(at))) for at, n in zip(first, counts, strict=True)))

    def fastest(self, most: int) -> tuple[list[Split], int]:
        """Of each base that has one that fits, the best split; all bases that are among the `most` fastest, or as fast
        as these. And how many candidates were computed in full."""
        time_, bytes_ = self._bounds
        order = np.flatnonzero(bytes_ * SPARE <= self.pool.device.memory)
        order = order[np.argsort(time_[order], kind="stable")]
        found: list[Split] = []
        fastest: list[float] = []
        counted = compared = 0
        for first in range(0, len(order), _BLOCK):
            fastest = heapq.nsmallest(most, [*fastest, *(one.seconds for one in found[counted:])])
            counted = len(found)
            if len(fastest) == most and time_[order[first]] > fastest[-1] * (1 + _EQUAL):
                break
            for splits in self._computed(order[first : first + _BLOCK]):
                compared += len(splits)
                fitting = [one for one in splits if one.total * SPARE <= self.pool.device.memory]
                if fitting:
                    found.append(self._simplest(fitting))
        return found, compared

    def simulated(self, found: list[Split]) -> list[Split]:
        """With the pipelines of the fastest simulated, where their schedules have no exact closed form."""
        order = sorted(range(len(found)), key=lambda n: found[n].seconds)[:_RANKED]
        cases: dict[Case, list[int]] = {}
        for n in order:
            if (case := self._case(found[n])).schedule in piped.SIMULATED:
                cases.setdefault(case, []).append(n)
        found = list(found)
        for case in piped.affordable(list(cases)):
            some = [found[n] for n in cases[case]]
            for n, one, (seconds, alone) in zip(cases[case], some, self._piped(case, some), strict=True):
                found[n] = replace(one, seconds=float(seconds), alone=float(alone))
        return found

    def _case(self, one: Split) -> Case:
        bases, base = self.bases, one.base
        batches = self.question.global_batch // (bases.data[base] * bases.micro_batch[base])
        return Case(
            NAMES[bases.schedule[base]] if bases.pipeline[base] > 1 else "",
            int(bases.pipeline[base]), int(bases.chunks[base]), int(batches),
        )  # fmt: skip

    def _piped(self, case: Case, some: list[Split]) -> Array:
        """Seconds of each of these steps, its pipeline simulated, and of that pipeline without messages, (n, 2)."""
        work, known = self.work(*np.array([(one.base, one.fsdp, one.zero) for one in some]).T)
        passes, sent = step.passes(work, self.known, known), step.message(work, known.rates)
        simulated, alone = piped.seconds(case, self.question.shape, passes, sent)
        parts = self._cost(work, case.schedule, known).parts
        beside = sum((parts[name] for name in _BESIDE if name in parts), start=np.zeros(len(some)))
        return np.stack([simulated + beside, alone], axis=-1)

    def smallest(self) -> Split:
        """The candidate with the least bytes on its fullest device."""
        _, bytes_ = self._bounds
        order = np.argsort(bytes_, kind="stable")
        best: Split | None = None
        for first in range(0, len(order), _BLOCK):
            if best is not None and bytes_[order[first]] > best.total:
                break
            every = [one for splits in self._computed(order[first : first + _BLOCK]) for one in splits]
            least = min(every, key=lambda one: one.total)
            best = least if best is None or least.total < best.total else best
        assert best is not None
        return best

    def find(self, layout: Layout, chunks: int = 1) -> Split | None:
        """This layout, computed, whether it fits in memory or not; None where it is none of the candidates. chunks:
        stages that a rank of its pipeline has."""
        base, same = self.bases, np.ones(len(self.bases), dtype=bool)
        wanted = {name: getattr(layout, name) for name in ("tensor", "context", "pipeline", "expert", "micro_batch")}
        wanted |= {"data": layout.replicas * layout.fsdp, "chunks": chunks, "recompute": layout.recompute == "block"}
        if layout.pipeline > 1:
            wanted["schedule"] = NAMES.index(layout.schedule)
        for name, value in wanted.items():
            same &= getattr(base, name) == value
        splits = [one for found in self._computed(np.flatnonzero(same)) for one in found]
        return next((one for one in splits if (one.fsdp, one.zero) == (layout.fsdp, layout.zero)), None)

    def ranked(self, found: list[Split]) -> list[Split]:
        """The fastest first; of those as fast as the fastest left, the simplest."""
        left = sorted(found, key=lambda one: one.seconds)
        ranked: list[Split] = []
        # Those as fast as the fastest that is left, the simplest on top; it only grows.
        as_fast: list[tuple[tuple[float, ...], int]] = []
        taken: set[int] = set()
        first = end = 0
        while len(ranked) < min(_RANKED, len(left)):
            while first in taken:
                first += 1
            while end < len(left) and left[end].seconds <= left[first].seconds * (1 + _EQUAL):
                heapq.heappush(as_fast, (self._complexity(left[end]), end))
                end += 1
            _, simplest = heapq.heappop(as_fast)
            taken.add(simplest)
            ranked.append(left[simplest])
        return ranked

    def unlike(self, ranked: list[Split]) -> list[Split]:
        """Of those that share axes, ZeRO stage and recomputation the best, in the same order."""
        base = self.bases
        axes = (base.tensor, base.context, base.pipeline, base.expert, base.data, base.recompute)
        first: dict[tuple[int, ...], Split] = {}
        for one in ranked:
            first.setdefault((*(int(axis[one.base]) for axis in axes), one.fsdp, one.zero), one)
        return list(first.values())

    def plan(self, one: Split) -> Plan:
        candidate, known = self.alone(one)
        schedule = NAMES[self.bases.schedule[one.base]]
        found = self._cost(candidate, schedule, known)
        kept = memory.cost(candidate, schedule)
        parts = {name: float(part[0]) for name, part in found.parts.items()}
        if one.alone is not None:
            steady = sum(part for name, part in parts.items() if name not in ("bubble", "messages", *_BESIDE))
            waited = parts["bubble"] + parts["messages"] + one.seconds - float(found.seconds[0])
            parts["bubble"] = max(one.alone - steady, 0.0)
            parts["messages"] = waited - parts["bubble"]
        of_memory = {name: float(part[0]) for name, part in kept._asdict().items()}
        of_memory["beside"] = one.total - sum(of_memory.values())
        low, high = self.interval()
        question, seconds = self.question, one.seconds
        rate, price = question.global_batch * question.sequence / seconds, question.cluster.price
        peak = self.pool.device.peak.get(question.precision, self.pool.device.peak_16)
        exposed = sum(parts.get(name, 0.0) for name in ("tensor", "context", "fsdp", "messages", "data", "sync"))
        return Plan(
            layout=self.bases.layout(one.base, one.fsdp, one.zero, question.shape.layers),
            chunks=int(self.bases.chunks[one.base]), seconds=seconds, low=seconds * low, high=seconds * high,
            tokens_per_second=rate, per_device=rate / self.pool.count,
            mfu=question.shape.flops_per_token(question.sequence) * rate / self.pool.count / peak,
            memory=of_memory, capacity=self.pool.device.memory, parts=parts, bubble=parts["bubble"] / seconds,
            exposed=exposed / seconds, limit=self._limit(one, seconds, parts["bubble"]),
            cost=None if price is None else price / 3600 / rate * 1e9,
            days=None if question.tokens is None else question.tokens / rate / 86400,
            staleness=syncs.staleness(question, int(self.bases.data[one.base]) // one.fsdp),
        )  # fmt: skip

    def _cost(self, candidate: Work, schedule: str, known: Blocks, servers: float = 1.0) -> Step:
        found = step.cost(candidate, self.known, schedule, known)
        return syncs.exchanged(found, candidate, self.known, known.rates, self.question, servers)

    def _limit(self, one: Split, seconds: float, bubble: float) -> str:
        """What a step would be shortened most by, were it twice as fast: or the pipeline's waiting, were there none."""
        candidate, _ = self.alone(one)
        schedule, usual = NAMES[self.bases.schedule[one.base]], Rates.of(self.known, candidate)
        called = {
            "compute": replace(usual, product=usual.product * 2, product_low=usual.product_low * 2),
            "memory bandwidth": replace(usual, memory=usual.memory * 2),
            "launching": replace(usual, host=usual.host / 2),
            f"{self.pool.inside.kind} inside nodes": replace(usual, link=usual.link * 2),
            f"{self.pool.between.kind} between nodes": replace(usual, nic=usual.nic * 2),
        }
        saved = {"pipeline bubble": bubble}
        for name, rates in called.items():
            faster = self._cost(candidate, schedule, step.blocks(candidate, self.known, rates))
            saved[name] = seconds - float(faster.seconds[0])
        if self.question.sync.name == "server":
            faster = self._cost(candidate, schedule, step.blocks(candidate, self.known), servers=2.0)
            saved["updating on servers"] = seconds - float(faster.seconds[0])
        return max(saved, key=lambda name: saved[name])

    def interval(self) -> tuple[float, float]:
        fitted = {one.group for one in self.known.all if one.kind == DEVICE}
        unseen = self.pool.device.name.partition("-")[0] not in fitted
        spread = score.ROW**2 + score.TABLE**2 + score.STACK**2 + score.DEVICE**2 * unseen
        spread += score.EXPERTS**2 * bool(self.question.shape.experts)
        (low,), (high,) = score.interval(np.sqrt(np.array([spread])))
        return float(low), float(high)

    def _complexity(self, one: Split) -> tuple[int, int, int, float, float]:
        base = self.bases
        axes = (base.tensor, base.context, base.pipeline, base.expert)
        several = sum(int(axis[one.base]) > 1 for axis in axes) + (one.fsdp > 1) + (one.fsdp < base.data[one.base])
        group = int(base.tensor[one.base] * base.pipeline[one.base])
        return several, group, int(base.recompute[one.base]), one.seconds, one.total

    def _simplest(self, splits: list[Split]) -> Split:
        """Of a base: as fast as any, with the fewest axes, and of these with most memory left."""
        least = min(one.seconds for one in splits) * (1 + _EQUAL)
        return min((one for one in splits if one.seconds <= least), key=lambda s: (*self._complexity(s)[:3], s.total))

    def _splits(self, base: int) -> list[tuple[int, int]]:
        return candidates.splits(self.bases, base, self.question)

    def _computed(self, bases: Numbers) -> Iterator[list[Split]]:
        """Of each of these bases all splits."""
        splits = [self._splits(int(one)) for one in bases]
        if not splits:
            return
        which = np.repeat(bases, [len(some) for some in splits])
        fsdp, zero = np.array([pair for some in splits for pair in some], dtype=np.int64).T
        seconds, total = np.empty(len(which)), np.empty(len(which))
        for schedule, rows in self._by_schedule(which):
            candidate, known = self.work(which[rows], fsdp[rows], zero[rows])
            seconds[rows] = self._cost(candidate, schedule, known).seconds
            total[rows] = memory.cost(candidate, schedule).total("device", self.pool.device.memory)
        at = 0
        for base, some in zip(bases, splits, strict=True):
            end = at + len(some)
            yield [
                Split(int(base), *pair, float(seconds[n]), float(total[n]))
                for n, pair in zip(range(at, end), some, strict=True)
            ]
            at = end

    @cached_property
    def _bounds(self) -> tuple[Array, Array]:
        """Of each base: seconds and bytes that no split of it is under.

        Time: without anything that happens once a step beside the pipeline, and without what FSDP gathers. Memory:
        everything shared by all that could share it, but without what is gathered for that; on the fuller of the ends.
        """
        seconds, total = np.empty(len(self.bases)), np.empty(len(self.bases))
        for schedule, rows in self._by_schedule(np.arange(len(self.bases))):
            for first in range(0, len(rows), _CHUNK):
                some = rows[first : first + _CHUNK]
                # Replicas, where they are given, share nothing.
                fsdp = self.bases.data[some] // (self.question.replicas or 1)
                plain, known = self.work(some, fsdp, np.ones_like(fsdp))
                shared, _ = self.work(some, fsdp, np.full_like(fsdp, 3))
                found = step.cost(plain, self.known, schedule, known)
                seconds[some] = found.seconds - found.parts["data"] - found.parts["optimizer"]
                seconds[some] += syncs.least(self.question, known.rates)
                total[some] = _least_bytes(plain, shared, schedule)
        return seconds, total

    def _by_schedule(self, which: Numbers) -> Iterator[tuple[str, Numbers]]:
        for number, name in enumerate(NAMES):
            rows = np.flatnonzero(self.bases.schedule[which] == number)
            if len(rows):
                yield name, rows

    def alone(self, one: Split) -> tuple[Work, Blocks]:
        """Of one candidate."""
        return self.work(np.array([one.base]), np.array([one.fsdp]), np.array([one.zero]))

    def work(self, which: Numbers, fsdp: Numbers, zero: Numbers) -> tuple[Work, Blocks]:
        """Of these bases, split so; and what their blocks take."""
        leaves, blocks = self._leaves
        sharers = fsdp * (self.bases.context[which] if self.stack.shares_context else 1)
        columns = self._columns(self.bases.take(which))
        columns |= {"fsdp": fsdp.astype(np.float64), "zero": np.where(sharers > 1, zero, 0).astype(np.float64)}
        if not syncs.plain(self.question):
            columns |= syncs.columns(self.question, columns["data"] / fsdp)
        return self._of(columns, len(which)), blocks.take(leaves[which])

    def _columns(self, bases: Bases) -> dict[str, Array]:
        names = ("tensor", "context", "pipeline", "chunks", "micro_batch", "recompute", "expert", "data")
        columns = {name: getattr(bases, name).astype(np.float64) for name in names}
        return columns | {"shards": (columns["tensor"] > 1).astype(np.float64)}

    def _of(self, columns: dict[str, Array], count: int) -> Work:
        same = {name: np.broadcast_to(np.float64(value), count) for name, value in self._same.items()}
        device = np.broadcast_to(np.array(self.pool.device.name), count)
        return Work({**same, **columns}, device, np.broadcast_to(np.array(self.stack.constants), count))

    @cached_property
    def _leaves(self) -> tuple[Numbers, Blocks]:
        """Of each base the number of its leaf, and what the leaves' blocks take. In fp8 weights are cast once a step,
        which is shared by its micro-batches: then these count, too."""
        names = ("tensor", "context", "micro_batch", "recompute", "expert")
        key = self._key((*names, "data") if self.question.precision == "fp8" else names)
        _, first, leaf = np.unique(key, return_index=True, return_inverse=True)
        some = self.bases.take(first)
        columns = self._columns(some) | {"fsdp": np.ones(len(first)), "zero": np.zeros(len(first))}
        return leaf, step.blocks(self._of(columns, len(first)), self.known)

    def _key(self, names: tuple[str, ...]) -> Numbers:
        """One number for each combination of these."""
        key = np.zeros(len(self.bases), dtype=np.int64)
        for name in names:
            values, place = np.unique(getattr(self.bases, name), return_inverse=True)
            key = key * len(values) + place
        return key


def _least_bytes(plain: Work, shared: Work, schedule: str) -> Array:
    """See `Space._bounds`. plain: under ZeRO 1; shared: under ZeRO 3."""
    found = np.zeros(len(plain))
    for rank in (np.zeros(len(plain)), plain.pipeline - 1):
        kept, states = memory.stage(plain, rank, schedule), memory.stage(shared, rank, schedule)
        least = kept._replace(
            weights=states.weights, gradients=states.gradients, optimizer=states.optimizer, sync=states.sync
        )
        found = np.maximum(found, least.total("device", plain.memory))
    return found
