"""The state machines that the processes of a scenario begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.sync.server import records as r
from shoal.sync.server.coordinator import Coordinator
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.follower import Follower
from shoal.sync.server.messages import Chain
from shoal.sync.server.shadow import Shadow
from shoal.sync.server.shard import ServerShard
from shoal.sync.server.standing import Standing
from shoal.sync.server.worker import Worker
from shoal.sync.simulate.scenario import Problem, Scenario


class Machines:
    """Makes them as the processes of `node` do, of a scenario's rules and a problem's numbers."""

    def __init__(self, scenario: Scenario, problem: Problem, coordinator: type[Coordinator]):
        self.scenario, self.problem, self.rules = scenario, problem, scenario.rules
        self._make = coordinator
        self._chains = 0

    def coordinator(
        self, journal: Sequence[r.AnyRecord], now: float, due: Callable[[Standing], bytes | None]
    ) -> Coordinator:
        counts = [self.scenario.copies] * self.scenario.shards
        samples, growing = self.scenario.arrived(now)
        return self._make(
            self.rules, self.problem.rate, counts, journal=journal, samples=samples, growing=growing, now=now, due=due
        )

    def shard(self, number: int, copy: int, others: tuple[int, ...] = ()) -> ServerShard:
        return ServerShard(
            number, self.problem.held(number), copy=copy, others=others, level=self.rules.level,
            logged=self.scenario.copies == 1, retry=self.rules.retry, backups=self.rules.compensation == "dc",
            shadow=self._shadow(number, copy),
        )  # fmt: skip

    def worker(self, number: int) -> Worker:
        return Worker(
            number, self.scenario.shares[number] if self.scenario.shares else 1, self.scenario.shards,
            retry=self.rules.retry, heartbeat=self.rules.lease / 4,
            follower=Follower(self.rules.codec) if self.rules.codec != "none" else None,
        )  # fmt: skip

    def encoder(self, number: int) -> Encoder | None:
        """Of a worker, where there is a codec."""
        if self.rules.codec == "none":
            return None
        return Encoder(self.rules, seed=self.scenario.seed, worker=number)

    def _shadow(self, number: int, copy: int) -> Shadow | None:
        if self.rules.codec == "none":
            return None
        self._chains += 1
        return Shadow(self.rules.codec, Chain(copy, self._chains), seed=self.scenario.seed, shard=number)
