"""What is simulated: machines, network, faults, and what the workers compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.sync.server.held import Held
from shoal.sync.server.messages import Key, Range
from shoal.sync.server.rules import Rules
from shoal.sync.server.worker import Pushed


@dataclass(frozen=True)
class Fault:
    """role: `worker`, `shard`, `coordinator`. At `time` it is killed after `effects` more of what it does.

    down: seconds until it is started again. hang: it is not killed, but does nothing for so long.
    """

    time: float
    role: str
    number: int = 0
    effects: int = 0
    down: float = 1.0
    hang: bool = False


@dataclass(frozen=True)
class Scenario:
    """speeds: seconds that each worker computes on a micro-batch. shares: micro-batches of each one's gradient.

    delay: seconds a message is on its way; jitter: times `delay`, the mean of what comes on top (exponential, so that
    messages overtake each other). loss, double: share of messages. patience: simulated seconds after which it is given
    up. copies: of each shard; shards of one copy keep a log. shares: none = 1 each. arrivals: of a store that grows,
    seconds and how many of the samples there are from then on, in order; none = all from the beginning. saves: share of
    commits that there is to be a checkpoint of, while none is on its way. starts: seconds at which each worker is
    started, with 0 of the first `rules.workers`; none = all at the beginning.
    """

    rules: Rules
    speeds: tuple[float, ...]
    samples: int
    seed: int = 0
    shards: int = 1
    copies: int = 1
    shares: tuple[int, ...] = ()
    delay: float = 0.01
    jitter: float = 0.0
    loss: float = 0.0
    double: float = 0.0
    faults: tuple[Fault, ...] = ()
    patience: float = 10_000.0
    arrivals: tuple[tuple[float, int], ...] = ()
    saves: float = 0.0
    starts: tuple[float, ...] = ()

    def arrived(self, time: float) -> tuple[int, bool]:
        """How many samples there are by then, and whether more will come."""
        if not self.arrivals:
            return self.samples, False
        here = max((count for at, count in self.arrivals if at <= time), default=0)
        return here, here < self.samples


class Problem(Protocol):
    """What is trained, or what a test puts in its place."""

    def held(self, shard: int) -> Held: ...
    def rate(self, samples: int) -> float: ...
    def copy(self, tensors: Sequence[Any]) -> Sequence[Any]: ...
    def gradient(
        self, pulled: Mapping[int, Sequence[Any]], samples: Range, token: tuple[int, Key]
    ) -> tuple[Mapping[int, Pushed], float, float]: ...
