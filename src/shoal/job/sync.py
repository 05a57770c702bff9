"""How the replicas are kept consistent."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import at_least, one_of, positive, require


@dataclass(frozen=True)
class SyncOptions:
    """Replicas agree by all-reducing gradients every step, or train apart and come together every so many steps."""

    name: str = "allreduce"
    """`allreduce`: every step, sums of gradients over all replicas. `local`: each replica takes steps of its own, and
    after `every` of them an outer optimizer moves the common weights by the mean of what replicas have learned (local
    SGD, DiLoCo; docs/local-steps.md)."""
    codec: str = "none"
    """How gradients are written on their way between replicas: `none` = as they are, `bf16` or `fp16` = in half the
    bytes, rounded once on the way there and once on the way back. Sums are made in full precision. With `local`, what
    replicas have learned."""
    every: int = 50
    """local: steps of its own between two outer steps."""
    outer_lr: float = 0.7
    """local: learning rate of the outer optimizer; 1, with `outer_momentum` 0, averages weights."""
    outer_momentum: float = 0.9
    """local: Nesterov momentum of the outer optimizer."""
    fragments: int = 1
    """local: parts of the model that are exchanged in turn, each once in `every` steps: as many bytes, lower peaks."""
    delay: int = 0
    """local: steps for which a fragment may be on its way while training goes on; less than `every`."""
    mix: float = 0.0
    """local: share of its own weights that a replica keeps when a fragment arrives, 0 to less than 1."""
    together: int = 0
    """local: steps at the start of the run with all-reduce (post-local SGD)."""
    bucket_mib: float = 25.0
    """Gradients that travel together, in MiB; small buckets start early, large ones cost fewer latencies."""
    timeout: float = 600.0
    """Seconds after which a collective that does not end is an error."""

    compare: bool = True
    """Before every checkpoint, whether what several ranks hold is still equal to the last bit; if not, the run ends."""

    def validate(self) -> None:
        one_of("sync.name", self.name, ("allreduce", "local"))
        one_of("sync.codec", self.codec, ("none", "bf16", "fp16"))
        positive("sync.bucket_mib", self.bucket_mib)
        positive("sync.timeout", self.timeout)
        self._validate_rounds()

    def _validate_rounds(self) -> None:
        for name in ("every", "fragments"):
            at_least(f"sync.{name}", getattr(self, name), 1)
        positive("sync.outer_lr", self.outer_lr)
        for name in ("delay", "together"):
            at_least(f"sync.{name}", getattr(self, name), 0)
        for name in ("outer_momentum", "mix"):
            value = getattr(self, name)
            require(
                0 <= value < 1, f"sync.{name}={value} is not in [0, 1)", "e.g. 0.9" if name != "mix" else "e.g. 0.5"
            )
        require(
            self.fragments <= self.every,
            f"sync.fragments={self.fragments} take turns in sync.every={self.every} steps: more than one a step",
            f"sync.fragments={self.every} or fewer",
        )
        require(
            self.delay < self.every,
            f"sync.delay={self.delay} is not less than sync.every={self.every}: a fragment would leave twice",
            f"sync.delay={self.every - 1} or less",
        )
