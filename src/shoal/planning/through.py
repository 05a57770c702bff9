"""One pipeline through several pools: the blocks of its stages, its seconds and its memory -> Plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from shoal.job.layout import Layout
from shoal.planning import step, timeline
from shoal.planning.candidates import Numbers
from shoal.planning.cluster import Pool
from shoal.planning.constants import HOP
from shoal.planning.divided import divided
from shoal.planning.plan import Plan
from shoal.planning.stages import SCHEDULE, Stages
from shoal.planning.timeline import Seconds
from shoal.planning.work import Array


@dataclass(frozen=True)
class Through:
    """candidate: of `stages`. order: numbers of its pools, along the pipeline. most: blocks that each rank has memory
    for, (ranks,). choice: of the divisions of blocks. given: the only one, if it is."""

    stages: Stages
    candidate: int
    order: tuple[int, ...]
    most: Numbers
    choice: int = 0
    given: tuple[int, ...] = ()

    @property
    def batches(self) -> int:
        """Micro-batches of a replica."""
        return int(self.stages.micro_batches[self.candidate])

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Of each rank of the pipeline its pool."""
        return self.stages.places(self.order)

    def pool(self, rank: int) -> Pool:
        return self.stages.pools[self.places[rank]]

    @cached_property
    def block(self) -> tuple[Array, Array, Array]:
        """Seconds of a micro-batch: forward and backward of a block on each rank, (ranks,); and (2,) of the output
        layer, of which a third is forward."""
        passes = self.stages.passes
        forward, backward = (
            np.array([float(getattr(passes[pool], name)[self.candidate]) for pool in self.places])
            for name in ("forward", "backward")
        )
        head = float(passes[self.places[-1]].head[self.candidate])
        return forward, backward, np.array([head / 3, head * 2 / 3])

    def _bytes(self, rank: int, blocks: int) -> float:
        found = self.stages.memory(self.places[rank], np.array([self.candidate]), rank, blocks)
        return float(found.total("device", self.stages.pools[self.places[rank]].device.memory)[0])

    @cached_property
    def divisions(self) -> Numbers:
        """Blocks of each rank, (n, ranks), the best first as far as a closed form tells; none where nothing fits."""
        if self.given:
            return np.array([self.given], dtype=np.int64)
        return divided(self.stages.question.shape.layers, *self.block, self.most, self.batches)

    @property
    def blocks(self) -> Numbers:
        """Of each rank."""
        return np.asarray(self.divisions[self.choice])

    @property
    def taken(self) -> tuple[Array, Array]:
        """Seconds of a micro-batch on each rank, forward and backward."""
        return self._taken(self.blocks)

    def _taken(self, blocks: Numbers) -> tuple[Array, Array]:
        forward, backward, head = self.block
        forward, backward = blocks * forward, blocks * backward
        forward[..., -1] += head[0]
        backward[..., -1] += head[1]
        return forward, backward

    def fastest(self) -> Through:
        """With that division of blocks with which the pipeline is fastest, simulated."""
        return replace(self, choice=int(np.argmin(self._simulated(self.divisions, self.messages))))

    def _simulated(self, blocks: Numbers, sent: Array) -> Array:
        """Seconds of the pipeline, (n,) of (n, ranks) blocks."""
        forward, backward = self._taken(np.atleast_2d(blocks))
        taken = Seconds(forward, backward, np.zeros_like(forward))
        return timeline.seconds(SCHEDULE, self.stages.ranks, 1, self.batches, taken, sent[None])

    @cached_property
    def messages(self) -> Array:
        """Seconds of one from each rank to the next, (ranks - 1,)."""
        return np.array([self._message(rank) for rank in range(self.stages.ranks - 1)])

    def _message(self, rank: int) -> float:
        work, known = self.stages.work(self.places[rank], np.array([self.candidate]), 1)
        one, other, rates = self.pool(rank), self.pool(rank + 1), known.rates
        if one is other:
            return float(step.message(work, rates)[0])
        link, apart = self.stages.question.cluster.link(one, other), one.site != other.site
        # A line between sites is shared by all ranks of a stage, of all replicas.
        rate = np.minimum(rates.nic, link.bandwidth / (self.stages.each if apart else 1))
        found = float(step.message(work, replace(rates, nic=rate))[0])
        return found + (max(0.0, link.latency - HOP) if apart else 0.0)

    @cached_property
    def after(self) -> tuple[float, Mapping[str, float]]:
        """Of the pool that takes longest of them: seconds of reducing gradients and of the optimizer; its step's
        parts."""
        costs = []
        for pool in self.order:
            most = max(int(n) for n, place in zip(self.blocks, self.places, strict=True) if place == pool)
            parts = self._parts(pool, most)
            costs.append((parts["data"] + parts["optimizer"], parts))
        return max(costs, key=lambda cost: cost[0])

    def _parts(self, pool: int, blocks: int) -> dict[str, float]:
        found = self.stages.cost(pool, self.candidate, blocks).parts
        return {name: float(part[0]) for name, part in found.items()}

    @cached_property
    def estimate(self) -> float | None:
        """Seconds of a step, without simulating; None where nothing fits."""
        if not len(self.divisions):
            return None
        both = self.taken[0] + self.taken[1]
        steady = (self.batches - 1) * max(float(both.max()), float(self.messages.max()))
        return steady + self._first + self.after[0]

    @property
    def _first(self) -> float:
        """Seconds of a micro-batch alone, there and back."""
        return float(np.sum(self.taken) + 2 * self.messages.sum())

    def pipeline(self) -> dict[str, float]:
        """Parts of what the pipeline takes, simulated."""
        alone, waited = (float(self._simulated(self.blocks, sent)[0]) for sent in (0 * self.messages, self.messages))
        # A line carries one message at a time each way.
        waited = max(waited, self._first + (self.batches - 1) * float(self.messages.max()))
        both = self.taken[0] + self.taken[1]
        slowest = int(np.argmax(both))
        here = self._parts(self.places[slowest], int(self.blocks[slowest]))
        parts = {name: here[name] for name in ("tensor", "context", "fsdp")}
        steady = self.batches * float(both[slowest])
        parts["compute"] = steady - sum(parts.values())
        return parts | {"bubble": alone - steady, "messages": waited - alone}

    def plan(self) -> Plan:
        stages, question = self.stages, self.stages.question
        parts = self.pipeline() | {name: self.after[1][name] for name in ("data", "optimizer")}
        seconds = sum(parts.values())
        rate = question.global_batch * question.sequence / seconds
        peak = sum(p.count * p.device.peak.get(question.precision, p.device.peak_16) for p in stages.pools)
        fullest = max(range(stages.ranks), key=lambda r: self._bytes(r, self._of(r)) / self.pool(r).device.memory)
        kept = stages.memory(self.places[fullest], np.array([self.candidate]), fullest, self._of(fullest))
        of_memory = {name: float(part[0]) for name, part in kept._asdict().items()}
        of_memory["beside"] = self._bytes(fullest, self._of(fullest)) - sum(of_memory.values())
        spreads, price = [space.interval() for space in stages.spaces], question.cluster.price
        exposed = sum(parts[name] for name in ("tensor", "context", "fsdp", "messages", "data"))
        return Plan(
            layout=self.layout(), chunks=1, seconds=seconds,
            low=seconds * min(low for low, _ in spreads), high=seconds * max(high for _, high in spreads),
            tokens_per_second=rate, per_device=rate / question.cluster.count,
            mfu=question.shape.flops_per_token(question.sequence) * rate / peak, memory=of_memory,
            capacity=self.pool(fullest).device.memory, parts=parts, bubble=parts["bubble"] / seconds,
            exposed=exposed / seconds, limit=self._limit(parts),
            cost=None if price is None else price / 3600 / rate * 1e9,
            days=None if question.tokens is None else question.tokens / rate / 86400,
            along=tuple((stages.pools[n].name, stages.counts[n]) for n in self.order),
        )  # fmt: skip

    @property
    def fits(self) -> bool:
        """In memory, with a tenth to spare."""
        return bool((self.blocks <= self.most).all())

    def _of(self, rank: int) -> int:
        return int(self.blocks[rank])

    def layout(self) -> Layout:
        base, fsdp, zero = (int(part[self.candidate]) for part in self.stages.splits)
        one = self.stages.spaces[0].bases.layout(base, fsdp, zero, self.stages.question.shape.layers)
        blocks = "+".join(str(n) for n in self.blocks)
        return replace(one, pipeline=self.stages.ranks, schedule=SCHEDULE, stages=blocks)

    def _limit(self, parts: Mapping[str, float]) -> str:
        if parts["messages"] > max(parts["compute"], parts["bubble"]):
            return "messages of the pipeline from pool to pool"
        return f"stages in pool {self.pool(int(np.argmax(self.taken[0] + self.taken[1]))).name}, which take longest"
