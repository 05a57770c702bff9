"""What a server job's coordinator goes by, checked once. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import at_least, positive
from shoal.job.server import ROUNDS, STRENGTHS, ServerOptions


@dataclass(frozen=True)
class Rules:
    """bsp: every worker's gradient, one update. quorum: of the first `quorum` workers. asp, ssp: one update a push."""

    mode: str = "bsp"
    workers: int = 1
    """Nothing begins before so many workers have joined, those with the lowest numbers; later they may come and go,
    and others may join beyond them."""
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
    codec: str = "none"
    """In which gradients are pushed and weights are pulled; `none` = as they are."""
    feedback: bool = True
    """What the codec loses of a push goes along with the next one."""
    outer: bool = False
    """What workers push is how far steps of their own took them, not a gradient."""

    @classmethod
    def of(
        cls, options: ServerOptions, *, workers: int, micro_batch: int, clip: float, retry: float = 1.0,
        codec: str = "none", feedback: bool = True,
    ) -> Rules:  # fmt: skip
        """What options that have been checked mean for so many workers. Raises JobError for a quorum that they are not.

        micro_batch: samples. clip: `optim.clip`. retry: seconds. codec, feedback: `sync.codec`, `sync.feedback`.
        """
        return cls(
            mode=options.mode,
            workers=workers,
            staleness=options.staleness,
            max_staleness=None if options.max_staleness < 0 else options.max_staleness,
            quorum=options.closing(workers),
            grace=options.grace,
            level=options.level,
            lease=options.lease,
            reconnect=options.reconnect,
            retry=retry,
            clip=clip,
            micro_batch=micro_batch,
            compensation=options.compensation,
            strength=None if options.strength < 0 else options.strength,
            outer=options.local_steps > 1,
            codec=codec,
            feedback=feedback,
        ).validate()

    def validate(self) -> Rules:
        """What is not among the options of a job, or depends on the number of workers."""
        for name, least in (("workers", 1), ("quorum", 1), ("micro_batch", 1), ("clip", 0)):
            at_least(name, getattr(self, name), least)
        positive("retry", self.retry)
        return self

    @property
    def power(self) -> float:
        """Strength of the compensation, with its default."""
        return STRENGTHS.get(self.compensation, 0.0) if self.strength is None else self.strength

    @property
    def rounds(self) -> bool:
        return self.mode in ROUNDS

    @property
    def residuals(self) -> bool:
        """Whether workers hold what a codec has lost, and may owe something when there is nothing more to compute."""
        return self.codec != "none" and self.feedback

    def bound(self, others: int) -> int | None:
        """Largest number of commits between a worker's pull and its own, or None.

        others: incarnations that may commit meanwhile. Rounds: 0. ssp(s): others · (2s + 1), for when the worker
        pulled at clock c every other had answered at least c − s, and none begins a clock after c + s (Ho et al. 2013,
        "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", section 3, for the gate).
        Where W workers neither come nor go that is (W − 1)(2s + 1). One that is lost may have committed as many before,
        and one that joins, at the clock of the slowest and so at c − s or later, commits as many after: both count.
        """
        if self.rounds:
            return 0
        bounds = [] if self.max_staleness is None else [self.max_staleness]
        if self.mode == "ssp":
            bounds.append(others * (2 * self.staleness + 1))
        return min(bounds, default=None)
