"""What a server job's coordinator goes by, checked once. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import JobError
from shoal.job.check import at_least, one_of, positive, require

MODES = ("bsp", "asp", "ssp", "quorum")
LEVELS = ("snapshot", "shard", "hogwild")
COMPENSATIONS = ("none", "rate", "age", "dc", "delayed-nesterov", "look-ahead")
_STRENGTH = {"rate": 1.0, "age": 0.5, "dc": 0.04}


@dataclass(frozen=True)
class Rules:
    """bsp: every worker's gradient, one update. quorum: of the first `quorum` workers. asp, ssp: one update a push."""

    mode: str = "bsp"
    workers: int = 1
    """Nothing begins before so many workers have joined; later they may come and go."""
    staleness: int = 4
    """ssp: clocks that a worker may be ahead of the slowest one; a clock is one push."""
    max_staleness: int | None = None
    """asp, ssp: a gradient is rejected after more commits than this since its pull; None = never."""
    quorum: int = 1
    """quorum: gradients that close a round."""
    grace: float = 0.0
    """quorum: seconds that a round stays open after them, for the others."""
    level: str = "snapshot"
    """What a pull may see: `snapshot` one version on all shards; `shard` one on each; `hogwild` torn reads."""
    lease: float = 5.0
    """Seconds of silence after which a worker is given up."""
    reconnect: float = 0.5
    """Seconds after which a worker is given up whose connection broke, unless it is back."""
    retry: float = 1.0
    """Seconds after which what was not answered is said again."""
    clip: float = 1.0
    """Largest norm of an update's gradient; 0 = none."""
    micro_batch: int = 1
    """Samples in a micro-batch."""
    compensation: str = "none"
    """What is done about stale gradients: `shoal.sync.server.staleness`."""
    strength: float | None = None
    """Of the compensation: the power p of `rate` (None = 1) and `age` (½), λ of `dc` (0.04)."""

    def validate(self) -> Rules:
        one_of("mode", self.mode, MODES)
        one_of("level", self.level, LEVELS)
        one_of("compensation", self.compensation, COMPENSATIONS)
        for name, least in (("workers", 1), ("staleness", 0), ("quorum", 1), ("grace", 0), ("clip", 0),
                            ("power", 0), ("micro_batch", 1), ("reconnect", 0)):  # fmt: skip
            at_least(name, getattr(self, name), least)
        positive("lease", self.lease)
        positive("retry", self.retry)
        if self.max_staleness is not None:
            at_least("max_staleness", self.max_staleness, 0)
            require(self.mode in ("asp", "ssp"), f"max_staleness with mode={self.mode}", "rounds have no stale commits")
        require(self.quorum <= self.workers, f"quorum={self.quorum} of {self.workers} workers", "at most all of them")
        if self.compensation != "none" and self.rounds:
            raise JobError(
                f"compensation={self.compensation} with mode={self.mode}, where no gradient is stale",
                fix="mode asp or ssp, or compensation none",
            )
        if self.compensation == "dc" and self.level != "snapshot":
            raise JobError(
                f"compensation=dc with level={self.level}: it measures from the weights that a worker pulled",
                fix="level snapshot",
            )
        if self.compensation == "look-ahead" and self.level == "hogwild":
            raise JobError(
                "compensation=look-ahead with level=hogwild: it serves the weights themselves, which do not look ahead",
                fix="level snapshot or shard",
            )
        return self

    @property
    def power(self) -> float:
        """Strength of the compensation, with its default."""
        return _STRENGTH.get(self.compensation, 0.0) if self.strength is None else self.strength

    @property
    def rounds(self) -> bool:
        return self.mode in ("bsp", "quorum")

    def bound(self, others: int) -> int | None:
        """Largest number of commits between a worker's pull and its own, or None.

        others: workers that may commit meanwhile. Rounds: 0. ssp(s): others · (2s + 1), for when the worker pulled at
        clock c every other had answered at least c − s, and none begins a clock after c + s (Ho et al. 2013, "More
        Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", section 3, for the gate).
        """
        if self.rounds:
            return 0
        bounds = [] if self.max_staleness is None else [self.max_staleness]
        if self.mode == "ssp":
            bounds.append(others * (2 * self.staleness + 1))
        return min(bounds, default=None)
